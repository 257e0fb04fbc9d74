//! Which calls of the driver each of the runner's makes, in their order, on a driver that runs nothing: no GPU is needed.
//!
//! A graph captures a launch, and a server makes one per layer and step: a call more is a failure here.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use libloading::{Library, Symbol};
use waterfill_board::{Ended, Heap, Outcome};
use waterfill_cuda::{Call, Compiler, IdType, Quotas, ReplicaCall, Runner, Shape, WeightType};

const ORDINAL: usize = 3;
const STREAM: usize = 0x99;
const SHAPE: Shape = Shape {
    ranks: 8,
    experts: 256,
    redundant: 0,
    top_k: 6,
    id: IdType::I32,
    weight: WeightType::F32,
};
const CALL: Call = Call {
    ids: 1,
    weights: 2,
    out_ids: 3,
    out_weights: 4,
    rows: 4096,
    shared_weight: 1.0,
    unpadded: 0,
    quotas: Quotas::Own,
};
const LIVE: Quotas = Quotas::Live { cap: Duration::from_millis(1) };

/// With another's context current, or none.
const TO_OURS: &str = "cuCtxGetCurrent\ncuCtxPushCurrent_v2 0xc3\n";
const BACK: &str = "cuCtxPopCurrent_v2\n";
const RELAXED: &str = "cuThreadExchangeStreamCaptureMode 2 for 0\n";
const AS_BEFORE: &str = "cuThreadExchangeStreamCaptureMode 0 for 2\n";

/// Build tests/support/fake_NAME.c as a library that the loader knows as `soname` once it is opened.
fn build(name: &str, soname: &str) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/support/fake_{name}.c"));
    let file = std::env::temp_dir().join(format!("waterfill-{name}-{}.so", std::process::id()));
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-o"]);
    cc.arg(&file).arg(source).arg(format!("-Wl,-soname,{soname}"));
    assert!(cc.status().expect("cc, which rustc links with").success(), "{cc:?}");
    file
}

/// The fake driver, opened before cudarc looks for one, which then finds it by its name.
struct Driver(Library);

impl Driver {
    fn open() -> Self {
        let file = build("driver", "libcuda.so");
        // SAFETY: our own library, which has no initialisers.
        let library = unsafe { Library::new(&file) }.unwrap();
        std::fs::remove_file(file).unwrap();
        Self(library)
    }

    fn get<T>(&self, name: &str) -> Symbol<'_, T> {
        // SAFETY: each caller names the type that fake_driver.c gives it.
        unsafe { self.0.get(name.as_bytes()) }.unwrap()
    }

    /// What was called since the last time.
    fn calls(&self) -> String {
        let calls = self.get::<unsafe extern "C" fn() -> *const c_char>("fake_calls");
        // SAFETY: it gives a string, which changes at the next call of the driver.
        let text = unsafe { CStr::from_ptr(calls()) }.to_str().unwrap().to_string();
        // SAFETY: it takes nothing.
        unsafe { self.get::<unsafe extern "C" fn()>("fake_forget")() };
        text
    }

    /// From now on `function` gives `result`; none other does.
    fn refuse(&self, function: &str, result: c_int) {
        let (refuse, function) =
            (self.get::<unsafe extern "C" fn(*const c_char, c_int)>("fake_refuse"), function);
        let function = CString::new(function).unwrap();
        // SAFETY: a string, which it copies.
        unsafe { refuse(function.as_ptr(), result) };
    }

    fn set_architecture(&self, architecture: c_int) {
        // SAFETY: it takes a number.
        unsafe {
            self.get::<unsafe extern "C" fn(c_int)>("fake_architecture")(architecture);
        }
    }

    /// This thread has no context of ours and its own capture mode.
    fn check_thread(&self) {
        for of_thread in ["fake_contexts", "fake_mode"] {
            // SAFETY: it takes nothing and gives a number.
            let left = unsafe { self.get::<unsafe extern "C" fn() -> c_int>(of_thread)() };
            assert_eq!(left, 0, "{of_thread}");
        }
    }
}

fn board_shape() -> waterfill_board::Shape {
    waterfill_board::Shape::new(SHAPE.ranks, SHAPE.experts).unwrap()
}

/// Memory of a board.
fn board() -> Arc<Heap> {
    Arc::new(Heap::new(board_shape()))
}

fn attach(runner: &mut Runner, board: &Arc<Heap>) -> waterfill_cuda::Result<()> {
    runner.attach(Arc::clone(board), board_shape())
}

fn launch(runner: &Runner, rows: usize, quotas: Quotas) -> waterfill_cuda::Result<()> {
    // SAFETY: the fake driver runs nothing.
    unsafe { runner.launch(&Call { rows, quotas, ..CALL }, STREAM) }
}

fn tally(runner: &Runner) -> waterfill_cuda::Result<Ended> {
    // SAFETY: the fake driver has no streams.
    unsafe { runner.tally(STREAM) }
}

/// One test: the driver is the process's.
#[test]
fn every_call_of_ours_makes_these_of_the_driver_and_no_other() {
    let driver = Driver::open();
    let file = build("nvrtc", "libnvrtc.so");
    let compiler = Compiler::new(Some(&file), None).unwrap();
    std::fs::remove_file(file).unwrap();
    assert_eq!(driver.calls(), "", "NVRTC needs no driver");
    without_clusters(&driver, &compiler);
    driver.set_architecture(90);
    with_clusters(&driver, &compiler);
    with_replicas(&driver, &compiler);
    refused_while_made(&driver, &compiler);
    refused_later(&driver, &compiler);
    driver.set_architecture(10);
    let error = Runner::new(ORDINAL, SHAPE, 2, &compiler).unwrap_err();
    let said = "nvrtcCompileProgram failed: NVRTC_ERROR_INVALID_OPTION\nbad";
    assert_eq!(error.to_string(), said);
    // SAFETY: fake_nvrtc.c gives it this type; the compiler keeps the library open.
    let undestroyed = unsafe {
        let nvrtc = Library::new("libnvrtc.so").unwrap();
        nvrtc.get::<unsafe extern "C" fn() -> c_int>(b"fake_programs").unwrap()()
    };
    assert_eq!(undestroyed, 0, "programs of NVRTC that are left");
}

fn without_clusters(driver: &Driver, compiler: &Compiler) {
    driver.set_architecture(80);
    let mut runner = Runner::new(ORDINAL, SHAPE, 2, compiler).unwrap();
    let load =
        "cuModuleLoadData ELF\ncuModuleGetFunction expand_topk\ncuFuncSetAttribute 8 to 232448\n";
    let init = "cuInit 0\ncuDeviceGet 3\ncuDevicePrimaryCtxRetain 3\n";
    let attributes = "cuDeviceGetAttribute 75 of 3\ncuDeviceGetAttribute 76 of 3\ncuDeviceGetAttribute 97 of 3\n";
    let state = "cuModuleGetFunction move_up\ncuMemAlloc_v2 48\ncuStreamCreate flags 1\n\
        cuMemsetD8Async 0xa110c to 0, 48 bytes, stream 0x57\ncuStreamSynchronize 0x57\ncuStreamDestroy_v2 0x57\n";
    let warm = "cuStreamCreate flags 1\n\
        cuLaunchKernelEx 1x1x1 blocks of 128x1x1 threads, 2400 bytes, stream 0x57\n\
        cuLaunchKernelEx 1x1x1 blocks of 128x1x1 threads, 2400 bytes, stream 0x57\n\
        cuLaunchKernelEx 1x1x1 blocks of 256x1x1 threads, 0 bytes, stream 0x57\n\
        cuStreamSynchronize 0x57\ncuStreamDestroy_v2 0x57\n";
    assert_eq!(
        driver.calls(),
        [init, TO_OURS, RELAXED, attributes, load, load, state, AS_BEFORE, BACK].concat()
            + &[TO_OURS, RELAXED, warm, AS_BEFORE, BACK].concat()
    );
    let board = board();
    attach(&mut runner, &board).unwrap();
    let register =
        "cuMemHostRegister_v2 89920 bytes, flags 3\ncuMemHostGetDevicePointer_v2 flags 0\n";
    assert_eq!(driver.calls(), [TO_OURS, RELAXED, register, AS_BEFORE, BACK].concat());
    // The driver refuses to register memory twice.
    attach(&mut runner, &board).unwrap();
    assert_eq!(driver.calls(), [TO_OURS, RELAXED, AS_BEFORE, BACK].concat());
    for (rows, cut) in [(4, "128x1x1 threads, 2400"), (4096, "1024x1x1 threads, 29856")] {
        for quotas in [Quotas::Own, LIVE] {
            launch(&runner, rows, quotas).unwrap();
            let launched = format!("cuLaunchKernelEx 1x1x1 blocks of {cut} bytes, stream 0x99\n");
            assert_eq!(driver.calls(), [TO_OURS, &launched, BACK].concat());
        }
    }
    // SAFETY: the fake driver runs nothing.
    unsafe { runner.count(&CALL, 77, 0) }.unwrap();
    let launched = "cuLaunchKernelEx 1x1x1 blocks of 1024x1x1 threads, 29856 bytes, stream 0\n";
    assert_eq!(driver.calls(), [TO_OURS, launched, BACK].concat());
    // SAFETY: the fake driver runs nothing.
    unsafe { runner.move_up(1, 2, 5000, STREAM) }.unwrap();
    let launched = "cuLaunchKernelEx 20x1x1 blocks of 256x1x1 threads, 0 bytes, stream 0x99\n";
    assert_eq!(driver.calls(), [TO_OURS, launched, BACK].concat());
    // The fake driver's memory is all ones.
    assert_eq!(tally(&runner).unwrap()[Outcome::Torn], u64::from_ne_bytes([1; 8]));
    let copied = "cuMemcpyDtoHAsync_v2 0xa110c, 48 bytes, stream 0x99\ncuStreamSynchronize 0x99\n";
    assert_eq!(driver.calls(), [TO_OURS, copied, BACK].concat());
    drop(runner);
    assert_eq!(driver.calls(), "cuDevicePrimaryCtxRelease_v2 3\n");
    driver.check_thread();
}

fn with_clusters(driver: &Driver, compiler: &Compiler) {
    let mut runner = Runner::new(ORDINAL, SHAPE, 2, compiler).unwrap();
    let calls = driver.calls();
    // Of more than 8 blocks, by attribute 14 of a function; asked with all the shared memory there is.
    let asked = "cuFuncSetAttribute 14 to 1\ncuFuncSetAttribute 14 to 1\n\
        cuOccupancyMaxActiveClusters 16x1x1 blocks of 1024x1x1 threads, 232448 bytes, stream 0, \
        attribute 4: clusters of 16x1x1\n";
    assert!(calls.contains(asked), "{calls}");
    assert_eq!(calls.matches("cuOccupancyMaxActiveClusters").count(), 2, "{calls}");
    assert_eq!(calls.matches("cuModuleLoadData").count(), 4, "{calls}");
    assert_eq!(calls.matches("cuLaunchKernelEx").count(), 5, "{calls}");
    attach(&mut runner, &board()).unwrap();
    driver.calls();
    launch(&runner, 4096, LIVE).unwrap();
    let launched = driver.calls();
    assert!(launched.contains("stream 0x99, attribute 4: clusters of 16x1x1\n"), "{launched}");
    assert_eq!(launched.lines().count(), 4, "{launched}");
    drop(runner);
    driver.calls();
}

/// With redundant experts one kernel more is loaded and warmed, and makes the calls on the board.
fn with_replicas(driver: &Driver, compiler: &Compiler) {
    let shape = Shape { redundant: 32, ..SHAPE };
    let mut runner = Runner::new(ORDINAL, shape, 2, compiler).unwrap();
    let calls = driver.calls();
    assert_eq!(calls.matches("cuModuleLoadData").count(), 4, "{calls}");
    assert_eq!(calls.matches("cuModuleGetFunction choose_replicas").count(), 2, "{calls}");
    assert_eq!(calls.matches("cuFuncSetAttribute 8 to 232448").count(), 6, "{calls}");
    assert_eq!(calls.matches("cuFuncSetAttribute 14 to 1").count(), 3, "{calls}");
    assert_eq!(calls.matches("cuOccupancyMaxActiveClusters").count(), 3, "{calls}");
    assert_eq!(calls.matches("cuMemAlloc_v2 48").count(), 2, "{calls}");
    assert_eq!(calls.matches("cuLaunchKernelEx").count(), 7, "{calls}");
    // Tokens, visits, loads, rows of jobs, bits of 256 experts, the fingerprint.
    assert_eq!(runner.words(), 1 + 8 + 8 + 32 + 8 + 1);
    let call = ReplicaCall {
        ids: 1,
        rows: 4,
        unpadded: 0,
        out: 2,
        moved: true,
        quotas: 0,
        table: 3,
        logical: 4,
        gathered: 0,
        cap: Duration::from_millis(1),
    };
    // SAFETY: the fake driver runs nothing.
    let choose = |runner: &Runner, rows| unsafe {
        runner.choose_replicas(&ReplicaCall { rows, ..call }, STREAM)
    };
    let refused = |result: waterfill_cuda::Result<()>, said: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
        assert_eq!(driver.calls().matches("cuLaunchKernelEx").count(), 0);
    };
    refused(choose(&runner, 4), "without a board");
    refused(attach(&mut runner, &board()), "a board with 0 redundant experts: give one with 32");
    let board = waterfill_board::Shape::with_redundant(8, 256, 32).unwrap();
    runner.attach(Arc::new(Heap::new(board)), board).unwrap();
    driver.calls();
    for rows in [4, 4096] {
        choose(&runner, rows).unwrap();
        let launched = driver.calls();
        assert_eq!(launched.lines().count(), 4, "{launched}");
        assert_eq!(launched.contains("clusters of 16x1x1"), rows == 4096, "{launched}");
    }
    // SAFETY: the fake driver runs nothing.
    unsafe { runner.count_replicas(&call, 77, STREAM) }.unwrap();
    assert_eq!(driver.calls().matches("cuLaunchKernelEx").count(), 1);
    launch(&runner, 4, Quotas::Given { address: 5 }).unwrap();
    driver.calls();
    let gathered = Quotas::Gathered { cap: Duration::ZERO, address: 5 };
    for quotas in [LIVE, gathered] {
        refused(launch(&runner, 4, quotas), "32 redundant experts: choose replicas");
    }
    // SAFETY: the fake driver runs nothing.
    refused(unsafe { runner.count(&CALL, 77, STREAM) }, "32 redundant experts: count");
    refused(choose(&runner, 1 << 20), "256 experts (32 of them redundant)");
    drop(runner);
    let mut without = Runner::new(ORDINAL, SHAPE, 2, compiler).unwrap();
    driver.calls();
    refused(
        without.attach(Arc::new(Heap::new(board)), board),
        "32 redundant experts: give one with 0",
    );
    let shape = Shape { redundant: 256, ..SHAPE };
    let error = Runner::new(ORDINAL, shape, 2, compiler).unwrap_err().to_string();
    assert!(error.contains("256 redundant of 256 experts"), "{error}");
    drop(without);
    driver.calls();
}

/// Whatever is refused is named, and this thread is left as it was.
fn refused_while_made(driver: &Driver, compiler: &Compiler) {
    let fatal = [
        "cuInit",
        "cuDeviceGet",
        "cuDevicePrimaryCtxRetain",
        "cuCtxGetCurrent",
        "cuCtxPushCurrent_v2",
        "cuThreadExchangeStreamCaptureMode",
        "cuDeviceGetAttribute",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
        "cuMemAlloc_v2",
        "cuMemsetD8Async",
        "cuStreamCreate",
        "cuStreamSynchronize",
        "cuLaunchKernelEx",
    ];
    for (at, function) in fatal.into_iter().enumerate() {
        driver.refuse(function, 712);
        let error = Runner::new(ORDINAL, SHAPE, 2, compiler).unwrap_err();
        let name = "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED (712)";
        assert_eq!(error.to_string(), format!("{function} failed: {name}"));
        driver.check_thread();
        // What was retained is given back.
        let released = driver.calls().ends_with("cuDevicePrimaryCtxRelease_v2 3\n");
        assert_eq!(released, at >= 3, "{function}");
    }
    for function in ["cuOccupancyMaxActiveClusters", "cuStreamDestroy_v2"] {
        driver.refuse(function, 712);
        Runner::new(ORDINAL, SHAPE, 2, compiler).unwrap();
        driver.check_thread();
    }
    driver.refuse("", 0);
    driver.calls();
}

fn refused_later(driver: &Driver, compiler: &Compiler) {
    let mut runner = Runner::new(ORDINAL, SHAPE, 2, compiler).unwrap();
    let invalid = |function| format!("{function} failed: CUDA_ERROR_INVALID_VALUE (1)");
    let board = board();
    for function in ["cuMemHostRegister_v2", "cuMemHostGetDevicePointer_v2"] {
        driver.refuse(function, 1);
        assert_eq!(attach(&mut runner, &board).unwrap_err().to_string(), invalid(function));
        let unregistered = driver.calls().contains("cuMemHostUnregister\n");
        assert_eq!(unregistered, function == "cuMemHostGetDevicePointer_v2");
        driver.check_thread();
    }
    // What was refused is not remembered as registered.
    driver.refuse("", 0);
    attach(&mut runner, &board).unwrap();
    assert!(driver.calls().contains("cuMemHostRegister_v2"));
    driver.refuse("cuLaunchKernelEx", 1);
    let error = launch(&runner, 4, Quotas::Own).unwrap_err();
    assert_eq!(error.to_string(), invalid("cuLaunchKernelEx"));
    driver.refuse("cuMemcpyDtoHAsync_v2", 1);
    assert_eq!(tally(&runner).unwrap_err().to_string(), invalid("cuMemcpyDtoHAsync_v2"));
    driver.check_thread();
    driver.refuse("", 0);
}
