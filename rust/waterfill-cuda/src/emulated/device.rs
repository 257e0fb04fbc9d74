//! The kernel's source, compiled by a C++ compiler behind threads.h, and launched on the CPU.

use std::ffi::{CStr, OsString, c_char, c_void};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use libloading::Library;

use crate::args::Args;

use crate::driver::Launch;
use crate::shape::{Shape, Variant};
use crate::source::{FILES, source};

const THREADS: &str = include_str!("threads.h");
const RACES: &str = include_str!("races.h");
const PTX: &str = include_str!("ptx.h");
/// A mode of [`CALL`] alone: a level for the bases `quotas[0..32]` and `rows` tokens goes to `words[0]`, and the share of each lane,
/// of as many rows that fit, until there, of that total (`quotas[32..128]`), behind it.
pub const ARITHMETIC: u32 = 99;
/// Another: `move_up` runs with the `MoveArgs` at `words`.
pub const MOVE_UP: u32 = 98;
const CALL: &str = r#"
extern "C" void call_kernel(const void *pointer) {
    const Args &args = *(const Args *)pointer;
#if OWN_ONLY && !CLUSTERED
    if (args.mode == MOVE_UP) return move_up(*(const MoveArgs *)args.words);
#endif
    if (args.mode != ARITHMETIC) return expand_topk(args);
    if (warp() > 0) return;
    Entries bases;
    bases[0] = args.quotas[lane()];
    u32 level = level_of_few(bases, args.rows, lane_inverse());
    if (lane() == 0) args.words[0] = level;
    u32 fits = args.quotas[WARP + lane()], until = args.quotas[2 * WARP + lane()], total = args.quotas[3 * WARP + lane()];
    args.words[1 + lane()] = share(fits, until, total, __fdividef((float)fits, (float)total));
}
"#;

/// Arguments, blocks, those of a cluster, threads, shared bytes, seed, what is called meanwhile; gives null, or what went wrong.
type Run = unsafe extern "C" fn(
    &Args,
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
pub struct Emulated {
    run: Run,
    /// `run` is in it.
    _library: Library,
}

/// `CXX`, or the one there is. gcc without g++ compiles no C++.
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

impl Emulated {
    /// One of a shape's kernels, from its source as `edit` gives it.
    pub fn new(
        compiler: &OsString,
        shape: &Shape,
        variant: Variant,
        edit: impl Fn(String) -> String,
    ) -> Self {
        static FOLDERS: AtomicU32 = AtomicU32::new(0);
        // Relaxed: a number that nobody else gets, no more.
        let number = FOLDERS.fetch_add(1, Ordering::Relaxed);
        let name = format!("waterfill-emulated-{}-{number}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        let kernel = edit(with_stand_ins(shape, variant));
        let modes = format!("#define ARITHMETIC {ARITHMETIC}u\n#define MOVE_UP {MOVE_UP}u\n");
        let text = format!("{THREADS}{RACES}{kernel}{modes}{CALL}");
        std::fs::write(folder.join("kernel.cpp"), text).unwrap();
        build(compiler, &folder, variant);
        // SAFETY: built above; it runs nothing when it is loaded.
        let library = unsafe { Library::new(folder.join("kernel.so")) }.unwrap();
        // What is loaded stays so without its file.
        std::fs::remove_dir_all(folder).unwrap();
        // SAFETY: `launch` of threads.h, field by field.
        let run = unsafe { *library.get::<Run>(b"launch").unwrap() };
        Self { run, _library: library }
    }

    /// One launch; threads run in an order that depends on `seed`. Whoever reads the clock calls `meanwhile` first.
    ///
    /// # Safety
    /// The addresses of `args` are as the runner's launches ask for, in this process's memory.
    pub unsafe fn launch(
        &mut self,
        launch: Launch,
        args: &Args,
        seed: u32,
        mut meanwhile: &mut dyn FnMut(),
    ) -> Result<(), String> {
        let numbers = [launch.blocks, launch.cluster, launch.threads, launch.shared_bytes];
        let [blocks, cluster, threads, shared_bytes] = numbers.map(|n| n as u32);
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

/// The kernel's source with ptx.h in place of ptx.cuh.
fn with_stand_ins(shape: &Shape, variant: Variant) -> String {
    let (_, ptx) = FILES.iter().find(|(name, _)| *name == "ptx.cuh").unwrap();
    let source = source(shape, variant);
    let ptx = ptx.replace("#pragma once\n", "\n");
    assert!(source.contains(&ptx));
    source.replace(&ptx, PTX)
}

fn build(compiler: &OsString, folder: &Path, variant: Variant) {
    // Reductions over a warp are written twice, for architectures with and without them.
    let architecture = format!("-D__CUDA_ARCH__={}", if variant.clustered { 900 } else { 750 });
    let run = |arguments: &[&str]| {
        let output = Command::new(compiler).args(arguments).current_dir(folder).output();
        let output = output.unwrap_or_else(|error| panic!("{}: {error}", compiler.display()));
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{} {arguments:?}: {log}", compiler.display());
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
    ]);
    // Linked without the sanitizers: threads.h and races.h have the functions that they call.
    run(&["-shared", "kernel.o", "-o", "kernel.so"]);
}
