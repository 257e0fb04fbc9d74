//! Kernels from their source, by NVRTC, for the GPU at hand; kept on disk by the hash of what made them.

use std::ffi::{CStr, CString, c_char};
use std::fs;
use std::hash::{BuildHasher, DefaultHasher, Hash, Hasher, RandomState};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use cudarc::nvrtc::result::{self, NvrtcError};
use cudarc::nvrtc::sys;

use crate::error::{Error, Result};
use crate::installed::require_nvrtc;
use crate::shape::{Shape, Variant};
use crate::source::source;

/// The kernel's name in each module.
pub(crate) const EXPAND: &CStr = c"expand_topk";
/// One more in the modules of shapes with redundant experts that are not for own counts alone.
pub(crate) const CHOOSE: &CStr = c"choose_replicas";
/// One more in the module of one block for own counts alone.
pub(crate) const MOVE_UP: &CStr = c"move_up";

/// Compiles with NVRTC, or finds what it compiled before.
#[derive(Clone, Debug)]
pub struct Compiler {
    version: (i32, i32),
    cache: Option<PathBuf>,
}

impl Compiler {
    /// NVRTC by its name or as the file `nvrtc`; compiled kernels are kept in the folder `cache`, if given.
    ///
    /// # Errors
    /// NVRTC is not there.
    pub fn new(nvrtc: Option<&Path>, cache: Option<&Path>) -> Result<Self> {
        require_nvrtc(nvrtc)?;
        let mut version = (0, 0);
        // SAFETY: room for an integer each.
        unsafe { sys::nvrtcVersion(&mut version.0, &mut version.1) }
            .result()
            .map_err(refused("nvrtcVersion"))?;
        Ok(Self { version, cache: cache.map(Path::to_path_buf) })
    }

    /// The machine code of one of a shape's kernels for an architecture, `major * 10 + minor`; clusters are from 90 on.
    ///
    /// # Errors
    /// The compiler's, with its log. A cache that cannot be read or written is done without.
    pub fn compile(&self, shape: &Shape, variant: Variant, architecture: u32) -> Result<Vec<u8>> {
        let source = source(shape, variant);
        let options = [format!("--gpu-architecture=sm_{architecture}"), "--std=c++17".into()];
        let file = self.cache.as_ref().map(|folder| folder.join(self.name(&source, &options)));
        if let Some(code) = file.as_ref().and_then(|file| kept(file)) {
            return Ok(code);
        }
        let code = compile(&source, &options)?;
        if let Some(file) = file {
            // Without a cache every start compiles, about a second; no reason to fail.
            let _ = keep(&file, &code);
        }
        Ok(code)
    }

    /// Forget what `compile` keeps for it, for a file that the driver refuses.
    pub(crate) fn forget(&self, shape: &Shape, variant: Variant, architecture: u32) {
        let options = [format!("--gpu-architecture=sm_{architecture}"), "--std=c++17".into()];
        if let Some(folder) = &self.cache {
            let _ = fs::remove_file(folder.join(self.name(&source(shape, variant), &options)));
        }
    }

    /// 128 bits of all that the code depends on.
    fn name(&self, source: &str, options: &[String]) -> String {
        let half = |salt: u64| {
            let mut hasher = DefaultHasher::new();
            (salt, source, options, self.version).hash(&mut hasher);
            hasher.finish()
        };
        format!("{:016x}{:016x}.cubin", half(0), half(1))
    }
}

/// What this user kept there, if all of it is there. The driver is told no length: it would read past the end of a
/// file that a crash of the machine left short, at every start from then on. And a file that others could have written
/// is none: it would run as ours.
fn kept(file: &Path) -> Option<Vec<u8>> {
    let mut opened = fs::File::open(file).ok()?;
    let found = opened.metadata().ok()?;
    let own = fs::metadata("/proc/self").ok()?.uid();
    if found.uid() != own || found.mode() & 0o022 != 0 {
        return None;
    }
    let mut code = Vec::new();
    opened.read_to_end(&mut code).ok()?;
    let hash = code.split_off(code.len().checked_sub(size_of::<u64>())?);
    (hash == hash_of(&code)).then_some(code)
}

/// Write it beside, with its hash behind it, and rename: whoever reads finds all of it, and of several writers the last
/// wins. Beside is a file of this call's own: other threads keep the same kernel, and other containers' processes have
/// the same number.
fn keep(file: &Path, code: &[u8]) -> std::io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let own = RandomState::new().hash_one(std::process::id());
    let beside = file.with_extension(format!("{own:016x}.part"));
    let mut new = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    let written = new
        .write_all(code)
        .and_then(|()| new.write_all(&hash_of(code)))
        .and_then(|()| fs::rename(&beside, file));
    written.inspect_err(|_| {
        let _ = fs::remove_file(&beside);
    })
}

fn hash_of(code: &[u8]) -> [u8; size_of::<u64>()] {
    let mut hasher = DefaultHasher::new();
    code.hash(&mut hasher);
    hasher.finish().to_ne_bytes()
}

fn compile(source: &str, options: &[String]) -> Result<Vec<u8>> {
    let source = CString::new(source)
        .map_err(|_| Error::Argument("the kernel's source holds a zero byte".into()))?;
    let program = result::create_program(&source, Some(c"waterfill.cu"))
        .map_err(refused("nvrtcCreateProgram"))?;
    // SAFETY: created above, and destroyed below; `source`, which it was created from, lives until then.
    let code = match unsafe { result::compile_program(program, options) } {
        // SAFETY: as above; it is compiled.
        Ok(()) => unsafe { code_of(program) },
        Err(NvrtcError(code)) => {
            // SAFETY: as above.
            let log = unsafe { log_of(program) };
            Err(Error::Compiler { call: "nvrtcCompileProgram", log: format!("{code:?}\n{log}") })
        }
    };
    let mut program = program;
    // SAFETY: created above, and not used any more; NVRTC writes null to it, which cudarc's `destroy_program` takes by a shared
    // reference. What cannot be destroyed is left.
    let _ = unsafe { sys::nvrtcDestroyProgram(&mut program) };
    code
}

/// # Safety
/// The program is compiled, and not destroyed.
unsafe fn code_of(program: sys::nvrtcProgram) -> Result<Vec<u8>> {
    let mut size = 0;
    // SAFETY: the caller's promise, and room for an integer.
    unsafe { sys::nvrtcGetCUBINSize(program, &mut size) }
        .result()
        .map_err(refused("nvrtcGetCUBINSize"))?;
    let mut code = vec![0u8; size];
    // SAFETY: the caller's promise, and room for as many bytes as it just said.
    unsafe { sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()) }
        .result()
        .map_err(refused("nvrtcGetCUBIN"))?;
    Ok(code)
}

/// Empty if it cannot be had.
///
/// # Safety
/// The program is not destroyed.
unsafe fn log_of(program: sys::nvrtcProgram) -> String {
    // SAFETY: the caller's promise.
    let log = unsafe { result::get_program_log(program) }.unwrap_or_default();
    let bytes: Vec<u8> = log.into_iter().flat_map(c_char::to_ne_bytes).collect();
    String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_string()
}

/// NVRTC's refusal of the function `call`.
fn refused(call: &'static str) -> impl FnOnce(NvrtcError) -> Error {
    move |NvrtcError(code)| Error::Compiler { call, log: format!("{code:?}") }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn folder(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("waterfill-cuda-{name}-{}", std::process::id()))
    }

    #[test]
    fn a_file_that_is_not_whole_is_none() {
        let folder = folder("cut");
        let file = folder.join("code.cubin");
        let code: Vec<u8> = (0..100).collect();
        keep(&file, &code).unwrap();
        assert_eq!(kept(&file), Some(code));
        let whole = fs::read(&file).unwrap();
        for length in 0..whole.len() {
            fs::write(&file, &whole[..length]).unwrap();
            assert_eq!(kept(&file), None, "{length} of {} bytes", whole.len());
        }
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn threads_that_keep_the_same_kernel_do_not_cut_each_others() {
        let folder = folder("threads");
        let (file, code) = (folder.join("code.cubin"), vec![7; 1 << 20]);
        keep(&file, &code).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20 {
                        keep(&file, &code).unwrap();
                        assert!(kept(&file).is_some_and(|found| found == code));
                    }
                });
            }
        });
        let files: Vec<_> =
            fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()).collect();
        assert_eq!(files, [file]);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_kept_kernel_that_others_could_have_written_is_not_read() {
        let folder = folder("kept");
        let file = folder.join("one.cubin");
        keep(&file, b"code").unwrap();
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o600);
        assert_eq!(kept(&file).unwrap(), b"code");
        for mode in [0o620, 0o602, 0o666] {
            fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(kept(&file), None, "{mode:o}");
        }
        keep(&file, b"anew").unwrap();
        assert_eq!(kept(&file).unwrap(), b"anew");
        fs::remove_dir_all(folder).unwrap();
    }
}
