//! Whether the driver and NVRTC are there. cudarc panics where one is not, so it is asked after this.

use std::path::Path;
use std::sync::OnceLock;

use libloading::Library;

use crate::error::{Error, Result};

/// The driver's functions that are called here.
const DRIVER: [&str; 23] = [
    "cuInit",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain",
    "cuDevicePrimaryCtxRelease_v2",
    "cuCtxGetCurrent",
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuFuncSetAttribute",
    "cuOccupancyMaxActiveClusters",
    "cuMemAlloc_v2",
    "cuMemsetD8Async",
    "cuMemcpyDtoHAsync_v2",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemHostGetDevicePointer_v2",
    "cuLaunchKernelEx",
    "cuStreamCreate",
    "cuStreamSynchronize",
    "cuStreamDestroy_v2",
    "cuThreadExchangeStreamCaptureMode",
];

const NVRTC: [&str; 8] = [
    "nvrtcVersion",
    "nvrtcCreateProgram",
    "nvrtcCompileProgram",
    "nvrtcDestroyProgram",
    "nvrtcGetCUBINSize",
    "nvrtcGetCUBIN",
    "nvrtcGetProgramLogSize",
    "nvrtcGetProgramLog",
];

/// The CUDA driver is there, with every function that is needed.
pub(crate) fn open_driver() -> Result<()> {
    static FOUND: OnceLock<()> = OnceLock::new();
    let names = ["cuda", "nvcuda"];
    once(&FOUND, || {
        find("the CUDA driver", &names, &DRIVER, "install NVIDIA's driver for CUDA 11.8 or newer")
    })
}

/// NVRTC is there: by its name, or as the file `path`, which is then kept open.
///
/// # Errors
/// Neither can be loaded, or functions are missing.
pub fn open_nvrtc(path: Option<&Path>) -> Result<()> {
    static FOUND: OnceLock<()> = OnceLock::new();
    once(&FOUND, || {
        if let Some(path) = path {
            open_builtins(path);
            keep_open(path).map_err(|error| Error::Library {
                name: "NVRTC",
                reason: format!("{}: {error}", path.display()),
            })?;
        }
        find("NVRTC", &["nvrtc"], &NVRTC, "install nvidia-cuda-nvrtc, or give its path")
    })
}

/// Open a library for as long as the process lives: from now on it is found by its name.
fn keep_open(path: &Path) -> std::result::Result<(), libloading::Error> {
    // SAFETY: the library's initialisers run; NVRTC's do nothing of note, and the caller names the file.
    unsafe { Library::new(path) }.map(std::mem::forget)
}

/// NVRTC opens a library beside it by its name, which the loader does not look for there.
fn open_builtins(nvrtc: &Path) {
    let folder = nvrtc.parent().and_then(|folder| std::fs::read_dir(folder).ok());
    for file in folder.into_iter().flatten().flatten() {
        if file.file_name().to_string_lossy().starts_with("libnvrtc-builtins.so.") {
            // If it cannot be opened, NVRTC will say so.
            let _ = keep_open(&file.path());
        }
    }
}

/// Failures are not kept: the next caller may know more.
fn once(found: &OnceLock<()>, open: impl FnOnce() -> Result<()>) -> Result<()> {
    if found.get().is_none() {
        open()?;
        found.get_or_init(|| ());
    }
    Ok(())
}

/// The library that cudarc will find: the first of the same candidates in the same order.
fn find(name: &'static str, names: &[&str], functions: &[&str], advice: &str) -> Result<()> {
    let candidates = names.iter().flat_map(|name| cudarc::get_lib_name_candidates(name));
    // SAFETY: as in `open_nvrtc`, for the libraries of these names on the loader's own path.
    let Some(library) = candidates.into_iter().find_map(|name| unsafe { Library::new(name) }.ok())
    else {
        let reason = format!("no library of its name can be loaded; {advice}");
        return Err(Error::Library { name, reason });
    };
    // SAFETY: the symbols are not called, only looked for.
    let has = |function: &&&str| unsafe { library.get::<*const ()>(function.as_bytes()) }.is_err();
    match functions.iter().find(has) {
        None => Ok(()),
        Some(missing) => {
            let reason = format!("it has no {missing}, so it is too old; {advice}");
            Err(Error::Library { name, reason })
        }
    }
}
