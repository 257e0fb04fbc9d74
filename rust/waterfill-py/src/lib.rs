//! `waterfill_rs._native`: the core as Python sees it. Its docstrings are in `_native.pyi`.

use pyo3::prelude::*;

mod board;
mod cuda;
mod error;
mod exchange;
mod plan;
mod replicas;
mod tensors;

#[pymodule(gil_used = false)]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    plan::init(module)?;
    board::init(module)?;
    exchange::init(module)?;
    cuda::init(module)?;
    replicas::init(module)?;
    tensors::init(module)
}
