//! A shape's kernels, as the emulator compiles and launches them.

use std::ffi::OsStr;

use cuda_emulator::{Edit, Kernel, PTX, Source};
use waterfill_cuda::internal::{FILES, Launch, assertions, main_file, values};
use waterfill_cuda::{Shape, Variant};

/// A mode of [`CALL`] alone: a level for the bases `quotas[0..32]` and `rows` tokens goes to `words[0]`, and the share of each lane,
/// of as many rows that fit, until there, of that total (`quotas[32..128]`), behind it.
pub const ARITHMETIC: u32 = 99;
/// Another: `move_up` runs with the `MoveArgs` at `words`.
pub const MOVE_UP: u32 = 98;
/// Another: `choose_replicas` runs with the `ReplicaArgs` at `words`.
pub const CHOOSE: u32 = 97;
const CALL: &str = r#"
extern "C" void call_kernel(const void *pointer) {
    const Args &args = *(const Args *)pointer;
#if OWN_ONLY && !CLUSTERED
    if (args.mode == MOVE_UP) return move_up(*(const MoveArgs *)args.words);
#endif
#ifdef REDUNDANT
    if (args.mode == CHOOSE) return choose_replicas(*(const ReplicaArgs *)args.words);
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

/// The files of kernels/, with the emulator's functions in place of those that are PTX.
fn files() -> Vec<(String, String)> {
    let text = |name, text| if name == "ptx.cuh" { PTX } else { text };
    FILES.map(|(name, file)| (name.into(), text(name, file).into())).into()
}

/// Reductions over a warp are written twice, for architectures with and without them.
fn architecture(variant: Variant) -> u32 {
    if variant.clustered { 900 } else { 750 }
}

pub fn source(shape: &Shape, variant: Variant) -> Source {
    let (values, assertions) = (values(shape, variant), assertions(shape, variant));
    let modes = [("ARITHMETIC", ARITHMETIC), ("MOVE_UP", MOVE_UP), ("CHOOSE", CHOOSE)];
    let modes: String =
        modes.iter().map(|(name, mode)| format!("#define {name} {mode}u\n")).collect();
    let main = main_file(shape, variant);
    let text = format!("{values}#include \"{main}\"\n{assertions}{modes}{CALL}");
    Source { files: files(), text, architecture: architecture(variant) }
}

/// One file of kernels/ by itself, without a kernel.
pub fn alone(name: &str, shape: &Shape, variant: Variant) -> Source {
    let call = "extern \"C\" void call_kernel(const void *) {}";
    let text = format!("{}#include \"{name}\"\n{call}\n", values(shape, variant));
    Source { files: files(), text, architecture: architecture(variant) }
}

/// One of a shape's kernels, with a defect.
pub fn compile(compiler: &OsStr, shape: &Shape, variant: Variant, edits: &[Edit]) -> Kernel {
    Kernel::compile(compiler, &source(shape, variant).plant(edits)).unwrap()
}

/// A launch of the runner's.
pub fn launch(launch: Launch) -> cuda_emulator::Launch {
    let Launch { blocks, cluster, threads, shared_bytes } = launch;
    cuda_emulator::Launch { blocks, cluster, threads, shared_bytes }
}
