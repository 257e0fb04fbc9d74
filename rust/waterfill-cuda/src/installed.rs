//! Whether the driver and NVRTC are there, and new enough. cudarc panics where one is not, so it is asked after this.

use std::path::Path;
use std::sync::OnceLock;

use libloading::Library;

use crate::error::{Error, Result};

/// The newest of the driver's functions that are called: a driver that has them has all. They came with CUDA 11.8, as driver
/// 520; the next, `cuDevicePrimaryCtxRelease_v2`, with CUDA 11.0.
const NEWEST_OF_DRIVER: [&str; 2] = ["cuOccupancyMaxActiveClusters", "cuLaunchKernelEx"];
/// As above: machine code without PTX came with NVRTC 11.1; all else is older.
const NEWEST_OF_NVRTC: [&str; 2] = ["nvrtcGetCUBINSize", "nvrtcGetCUBIN"];

/// The CUDA driver is there, with every function that is needed.
pub(crate) fn require_driver() -> Result<()> {
    static FOUND: OnceLock<()> = OnceLock::new();
    once(&FOUND, || {
        let advice = "install NVIDIA's driver, 520 or newer";
        find("the CUDA driver", &["cuda", "nvcuda"], &NEWEST_OF_DRIVER, advice)
    })
}

/// NVRTC is there: by its name, or as the file `path`, which is then kept open.
///
/// # Errors
/// Neither can be loaded, or functions are missing.
pub(crate) fn require_nvrtc(path: Option<&Path>) -> Result<()> {
    static FOUND: OnceLock<()> = OnceLock::new();
    once(&FOUND, || {
        if let Some(path) = path {
            open_builtins(path);
            keep_open(path).map_err(|error| Error::Library {
                name: "NVRTC",
                reason: format!("{}: {error}", path.display()),
            })?;
        }
        let advice = "install nvidia-cuda-nvrtc, or give its path";
        find("NVRTC", &["nvrtc"], &NEWEST_OF_NVRTC, advice)
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

/// The library that cudarc will find, the first of the same candidates in the same order, has the `newest` functions.
fn find(name: &'static str, names: &[&str], newest: &[&str], advice: &str) -> Result<()> {
    let candidates = names.iter().flat_map(|name| cudarc::get_lib_name_candidates(name));
    // SAFETY: as in `keep_open`, for the libraries of these names on the loader's own path.
    let Some(library) = candidates.into_iter().find_map(|name| unsafe { Library::new(name) }.ok())
    else {
        let reason = format!("no library of its name can be loaded; {advice}");
        return Err(Error::Library { name, reason });
    };
    // SAFETY: the symbols are not called, only looked for.
    let lacks = |name: &&&str| unsafe { library.get::<*const ()>(name.as_bytes()) }.is_err();
    match newest.iter().find(lacks) {
        None => Ok(()),
        Some(missing) => {
            let reason = format!("it has no {missing}, so it is too old; {advice}");
            Err(Error::Library { name, reason })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(name: &str, newest: &[&str]) -> String {
        find("it", &[name], newest, "install it").unwrap_err().to_string()
    }

    #[test]
    fn a_library_that_is_not_there_is_named_with_what_to_do() {
        let said = refusal("waterfill-is-not-there", &[]);
        assert_eq!(said, "it cannot be used: no library of its name can be loaded; install it");
    }

    #[test]
    fn a_library_that_is_too_old_is_named_with_what_it_lacks() {
        let file = std::env::temp_dir().join(format!("waterfill-old-{}.so", std::process::id()));
        let mut cc = std::process::Command::new("cc");
        cc.args(["-shared", "-Wl,-soname,libwaterfill-old.so", "-x", "c", "/dev/null", "-o"]);
        assert!(cc.arg(&file).status().unwrap().success());
        keep_open(&file).unwrap();
        std::fs::remove_file(file).unwrap();
        let said = refusal("waterfill-old", &NEWEST_OF_DRIVER);
        let reason = "it has no cuOccupancyMaxActiveClusters, so it is too old; install it";
        assert_eq!(said, format!("it cannot be used: {reason}"));
    }
}
