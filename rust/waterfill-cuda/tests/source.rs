//! Every variant's source compiles, where there is an NVRTC. No GPU is needed.
//!
//! `NVRTC=FILE` names the library, such as the one in torch's wheels; else it is looked for by its name.

use std::path::PathBuf;

use waterfill_cuda::internal::FILES;
use waterfill_cuda::{Compiler, IdType, Shape, Variant, WeightType};

/// The machines of today, and one without clusters.
const ARCHITECTURES: [u32; 4] = [80, 90, 100, 120];

const BLOCK: Variant = Variant { clustered: false, own_only: false };
const CLUSTER: Variant = Variant { clustered: true, ..BLOCK };
const OWN_BLOCK: Variant = Variant { own_only: true, ..BLOCK };
const OWN_CLUSTER: Variant = Variant { own_only: true, ..CLUSTER };

fn compiler(cache: Option<&std::path::Path>) -> Option<Compiler> {
    let path = std::env::var_os("NVRTC").map(PathBuf::from);
    match Compiler::new(path.as_deref(), cache) {
        Ok(compiler) => Some(compiler),
        // Named but not usable is a failure; not there is none.
        Err(error) if path.is_some() => panic!("{error}"),
        Err(error) => {
            println!("SKIPPED: {error}");
            None
        }
    }
}

fn shape(top_k: usize, id: IdType, weight: WeightType) -> Shape {
    Shape { ranks: 8, experts: 256, redundant: 0, top_k, id, weight }
}

#[test]
fn every_variant_compiles() {
    let Some(compiler) = compiler(None) else { return };
    for id in [IdType::I32, IdType::I64] {
        for weight in [WeightType::F32, WeightType::Bf16] {
            for (top_k, variant) in [
                (1, CLUSTER),
                (6, BLOCK),
                (6, OWN_BLOCK),
                (6, CLUSTER),
                (8, OWN_CLUSTER),
                (32, CLUSTER),
            ] {
                let code = compiler.compile(&shape(top_k, id, weight), variant, 90).unwrap();
                assert!(code.starts_with(b"\x7fELF"), "{} bytes", code.len());
            }
        }
    }
    // Arrays, loops and ballots depend on the number of ranks: around a warp, around 16, both ends.
    for ranks in [1, 16, 17, 32, 33, 1024] {
        for (variant, top_k) in [(BLOCK, 7), (CLUSTER, 32)] {
            let shape =
                Shape { ranks, experts: ranks, ..shape(top_k, IdType::I64, WeightType::Bf16) };
            compiler.compile(&shape, variant, 90).unwrap();
        }
    }
    for (ranks, experts, redundant, top_k) in [(8, 288, 32, 8), (2, 4, 1, 1), (64, 320, 64, 32)] {
        for (variant, id) in [(BLOCK, IdType::I32), (CLUSTER, IdType::I64), (CLUSTER, IdType::I32)]
        {
            let shape = Shape { ranks, experts, redundant, ..shape(top_k, id, WeightType::Bf16) };
            compiler.compile(&shape, variant, 90).unwrap();
        }
    }
    for architecture in ARCHITECTURES {
        let variant = Variant { clustered: architecture >= 90, own_only: false };
        compiler.compile(&shape(6, IdType::I32, WeightType::F32), variant, architecture).unwrap();
    }
}

#[test]
fn what_was_compiled_is_found_again() {
    let folder = std::env::temp_dir().join(format!("waterfill-cuda-{}", std::process::id()));
    let Some(compiler) = compiler(Some(&folder)) else { return };
    let shape = shape(2, IdType::I32, WeightType::F32);
    let code = compiler.compile(&shape, BLOCK, 90).unwrap();
    let files: Vec<_> =
        std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    // It is taken as it is; what a crash of the machine left of it is not.
    let (whole, written) = (&files[0], || files[0].metadata().unwrap().modified().unwrap());
    let before = written();
    assert_eq!(compiler.compile(&shape, BLOCK, 90).unwrap(), code);
    assert_eq!(written(), before, "it was compiled again");
    for left in [b"".as_slice(), &code[..code.len() / 2]] {
        std::fs::write(whole, left).unwrap();
        assert_eq!(compiler.compile(&shape, BLOCK, 90).unwrap(), code);
        assert!(std::fs::read(whole).unwrap().len() > code.len(), "it was not kept anew");
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn an_error_has_the_compilers_log() {
    let Some(compiler) = compiler(None) else { return };
    let error = compiler.compile(&shape(6, IdType::I32, WeightType::F32), BLOCK, 1).unwrap_err();
    assert!(error.to_string().contains("gpu-architecture"), "{error}");
}

#[test]
fn an_error_names_the_line_of_the_kernels_file() {
    let Some(compiler) = compiler(None) else { return };
    let (_, file) = FILES.iter().find(|(name, _)| *name == "own.cuh").unwrap();
    let line =
        1 + file.lines().position(|line| line.contains("static_assert(TOP_K <= 32")).unwrap();
    let error = compiler.compile(&shape(33, IdType::I32, WeightType::F32), BLOCK, 90).unwrap_err();
    assert!(error.to_string().contains(&format!("own.cuh({line})")), "{error}");
}
