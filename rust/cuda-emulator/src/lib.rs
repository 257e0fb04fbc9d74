#![doc = include_str!("../README.md")]

mod source;

use std::ffi::{CStr, OsStr, OsString, c_char, c_void};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use libloading::Library;

pub use source::{Defect, Edit, Source, instead, marks, without};

/// C++ in place of the file in which the kernels have their PTX.
pub const PTX: &str = include_str!("ptx.h");
const HEADERS: [(&str, &str); 2] =
    [("threads.h", include_str!("threads.h")), ("races.h", include_str!("races.h"))];

/// A launch's numbers.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks of the grid.
    pub blocks: usize,
    /// Those of a cluster, of which there are two at most; else 1.
    pub cluster: usize,
    /// Threads of a block, whole warps.
    pub threads: usize,
    /// Bytes of a block's dynamic shared memory.
    pub shared_bytes: usize,
}

/// Arguments, blocks, those of a cluster, threads, shared bytes, seed, what is called meanwhile; gives null, or what went wrong.
type Run = unsafe extern "C" fn(
    *const c_void,
    u32,
    u32,
    u32,
    u32,
    u32,
    unsafe extern "C" fn(*mut c_void),
    *mut c_void,
) -> *const c_char;

/// One kernel on the CPU. Its launches are one after the other: `&mut`.
#[derive(Debug)]
pub struct Kernel {
    run: Run,
    /// `run` is in it.
    _library: Library,
}

/// `CXX`, or the C++ compiler there is; if there is none, standard error says SKIPPED. gcc without g++ compiles no C++.
#[must_use]
pub fn compiler() -> Option<OsString> {
    if let Some(named) = std::env::var_os("CXX") {
        // Named but not usable is a failure, at the first compilation.
        return Some(named);
    }
    let runs = |name: &&str| Command::new(name).arg("--version").output().is_ok();
    let found = ["c++", "g++", "clang++"].into_iter().find(runs);
    if found.is_none() {
        // Not by `println`, which a test that passes does not show.
        let _ = writeln!(std::io::stderr(), "SKIPPED: there is no c++, g++ or clang++, and no CXX");
    }
    found.map(Into::into)
}

impl Kernel {
    /// A kernel from its source.
    ///
    /// # Errors
    /// What the compiler says.
    ///
    /// # Panics
    /// Without a folder for temporary files, or where the compiler does not start.
    pub fn compile(compiler: &OsStr, source: &Source) -> Result<Self, String> {
        static FOLDERS: AtomicU32 = AtomicU32::new(0);
        // Relaxed: a number that nobody else gets, no more.
        let number = FOLDERS.fetch_add(1, Ordering::Relaxed);
        let name = format!("cuda-emulator-{}-{number}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let built = write(&folder, source).and_then(|()| build(compiler, &folder, source));
        // SAFETY: built above; it runs nothing when it is loaded.
        let library = built.map(|()| unsafe { Library::new(folder.join("kernel.so")) }.unwrap());
        // What is loaded stays so without its file.
        std::fs::remove_dir_all(folder).unwrap();
        let library = library?;
        // SAFETY: `launch` of threads.h, parameter by parameter.
        let run = unsafe { *library.get::<Run>(b"launch").unwrap() };
        Ok(Self { run, _library: library })
    }

    /// One launch; threads run in an order that depends on `seed`. Whoever reads the clock calls `meanwhile` first.
    ///
    /// # Errors
    /// What the emulator found wrong.
    ///
    /// # Safety
    /// `args` is what the source's `call_kernel` takes, and its addresses are those of arrays in this process that are as long as
    /// the kernel takes them to be.
    pub unsafe fn launch<A>(
        &mut self,
        launch: Launch,
        args: &A,
        seed: u32,
        mut meanwhile: &mut dyn FnMut(),
    ) -> Result<(), String> {
        let numbers = [launch.blocks, launch.cluster, launch.threads, launch.shared_bytes];
        let [blocks, cluster, threads, shared_bytes] = numbers.map(|n| n as u32);
        // What threads.h has room for.
        assert!(threads.is_multiple_of(32) && blocks * threads / 32 <= 2048, "{launch:?}");
        assert!(cluster == 1 || blocks <= 2 * cluster, "at most two clusters: {launch:?}");
        let args = std::ptr::from_ref(args).cast();
        let for_meanwhile = (&raw mut meanwhile).cast();
        // SAFETY: the caller's promise; `&mut self` because the library has one launch at a time; it calls
        // `call` with what it has to be called with, and not after it returned.
        let failure = unsafe {
            (self.run)(args, blocks, cluster, threads, shared_bytes, seed, call, for_meanwhile)
        };
        if failure.is_null() {
            return Ok(());
        }
        // SAFETY: a text that ends with zero and stays as it is until the next launch.
        Err(unsafe { CStr::from_ptr(failure) }.to_string_lossy().into_owned())
    }
}

/// # Safety
/// `meanwhile` is that of a launch that goes on.
unsafe extern "C" fn call(meanwhile: *mut c_void) {
    // SAFETY: made from it in `launch`, on the same OS thread, which does nothing else with it.
    let meanwhile = unsafe { &mut *meanwhile.cast::<&mut dyn FnMut()>() };
    meanwhile();
}

/// The files, and kernel.cpp, which includes them.
fn write(folder: &Path, source: &Source) -> Result<(), String> {
    let headers = HEADERS.map(|(name, text)| (name.to_string(), text.to_string()));
    let includes = HEADERS.map(|(name, _)| format!("#include \"{name}\"\n")).concat();
    let main = ("kernel.cpp".to_string(), includes + &source.text);
    for (name, text) in headers.iter().chain(&source.files).chain([&main]) {
        std::fs::write(folder.join(name), text).map_err(|error| format!("{name}: {error}"))?;
    }
    Ok(())
}

fn build(compiler: &OsStr, folder: &Path, source: &Source) -> Result<(), String> {
    let architecture = format!("-D__CUDA_ARCH__={}", source.architecture);
    let run = |arguments: &[&str]| {
        let output = Command::new(compiler).args(arguments).current_dir(folder).output();
        let output = output.unwrap_or_else(|error| panic!("{}: {error}", compiler.display()));
        let log = String::from_utf8_lossy(&output.stderr);
        let failed = || format!("{} {arguments:?}: {log}", compiler.display());
        output.status.success().then_some(()).ok_or_else(failed)
    };
    run(&[
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fno-strict-aliasing",
        "-fsanitize=alignment,bounds,thread",
        "-fno-sanitize-recover=all",
        &architecture,
        "-w",
        "-c",
        "kernel.cpp",
    ])?;
    // Linked without the sanitizers: threads.h and races.h have the functions that they call.
    run(&["-shared", "kernel.o", "-o", "kernel.so"])
}
