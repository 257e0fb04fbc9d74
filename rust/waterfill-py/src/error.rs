//! Errors and panics of the core as Python exceptions: one table.

use std::panic::{AssertUnwindSafe, catch_unwind};

use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

/// Run a call into the core. A refusal is a `ValueError` with the core's text; a panic is a
/// `RuntimeError`, because pyo3's own `PanicException` is no `Exception` and would end a server that
/// merely has the package installed.
pub fn guarded<T>(call: impl FnOnce() -> waterfill_core::Result<T>) -> PyResult<T> {
    caught(call, |error| PyValueError::new_err(error.to_string()))
}

/// [`guarded`] for calls to the board; where the system refuses, an `OSError`.
pub fn board_guarded<T>(call: impl FnOnce() -> waterfill_board::Result<T>) -> PyResult<T> {
    caught(call, |error| match error {
        waterfill_board::Error::System { .. } => PyOSError::new_err(error.to_string()),
        _ => PyValueError::new_err(error.to_string()),
    })
}

/// [`guarded`] for calls to the kernel's runner; where a library is missing or refuses, a `RuntimeError`.
pub fn cuda_guarded<T>(call: impl FnOnce() -> waterfill_cuda::Result<T>) -> PyResult<T> {
    use waterfill_cuda::Error;
    caught(call, |error| match error {
        Error::Argument(_) | Error::Core(_) => PyValueError::new_err(error.to_string()),
        _ => PyRuntimeError::new_err(error.to_string()),
    })
}

fn caught<T, E>(
    call: impl FnOnce() -> Result<T, E>,
    exception: impl FnOnce(E) -> PyErr,
) -> PyResult<T> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(exception),
        Err(_) => Err(PyRuntimeError::new_err(
            "waterfill-rs: a defect in the Rust core (its panic message is on stderr); please report it",
        )),
    }
}

/// A refusal by the binding itself.
pub fn refused(text: String) -> PyErr {
    PyValueError::new_err(text)
}
