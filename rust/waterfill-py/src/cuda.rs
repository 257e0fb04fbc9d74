//! The kernel on a CUDA device. Tensors cross as addresses: `waterfill_rs.cuda` checks them.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use waterfill_cuda::{Call, Compiler, Quotas, ReplicaCall, Runner, Shape};

use crate::board::PyBoard;
use crate::error::cuda_guarded;
use crate::tensors::{id_type, weight_type};

pub fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyCudaRunner>()
}

/// The kernel, compiled and loaded, and its state on one device.
#[pyclass(name = "CudaRunner", frozen)]
struct PyCudaRunner {
    inner: Runner,
}

#[pymethods]
impl PyCudaRunner {
    /// Compile the kernel, or find it in the folder `cache`, load it, and run it once.
    #[new]
    #[pyo3(signature = (device, *, ranks, experts, rank, top_k, id_bits, weight_bits, board, nvrtc, cache, redundant=0))]
    #[allow(clippy::too_many_arguments)] // Keyword arguments, each with a name of its own in Python.
    fn new(
        py: Python<'_>,
        device: usize,
        ranks: usize,
        experts: usize,
        rank: usize,
        top_k: usize,
        id_bits: usize,
        weight_bits: usize,
        board: Option<&PyBoard>,
        nvrtc: Option<PathBuf>,
        cache: Option<PathBuf>,
        redundant: usize,
    ) -> PyResult<Self> {
        let (id, weight) = (id_type(id_bits)?, weight_type(weight_bits)?);
        let shape = Shape { ranks, experts, redundant, top_k, id, weight };
        let board = board.map(|board| (Arc::clone(&board.inner), board.shape));
        // The compiler takes a second where nothing is cached.
        py.detach(|| {
            cuda_guarded(|| {
                let compiler = Compiler::new(nvrtc.as_deref(), cache.as_deref())?;
                let mut inner = Runner::new(device, shape, rank, &compiler)?;
                if let Some((memory, shape)) = board {
                    inner.attach(memory, shape)?;
                }
                Ok(Self { inner })
            })
        })
    }

    /// The most rows that a call may have.
    #[getter]
    fn max_rows(&self) -> usize {
        self.inner.max_rows()
    }

    /// int32 words that `unsafe_count_ptr` writes, or, with redundant experts, `unsafe_choose_replicas_ptr`.
    #[getter]
    fn words(&self) -> usize {
        self.inner.words()
    }

    /// Count by one launch on `stream`: int32 `[words]` at `out`.
    fn unsafe_count_ptr(
        &self,
        ids: u64,
        weights: u64,
        rows: usize,
        unpadded: u64,
        out: u64,
        stream: usize,
    ) -> PyResult<()> {
        let (out_ids, out_weights, shared_weight, quotas) = (0, 0, 0.0, Quotas::Own);
        let call =
            Call { ids, weights, out_ids, out_weights, rows, shared_weight, unpadded, quotas };
        // SAFETY: as at `unsafe_launch_ptr`; `out` is an int32 tensor of `words` elements on that device.
        cuda_guarded(|| unsafe { self.inner.count(&call, out, stream) })
    }

    /// One launch on `stream`. Quotas: at an address on the device if it is not 0; else live ones if there is a cap, from the counts
    /// at `gathered` if that is not 0; else own ones.
    #[allow(clippy::too_many_arguments)] // One caller, `waterfill_rs.cuda`, once a layer: no objects in between.
    fn unsafe_launch_ptr(
        &self,
        ids: u64,
        weights: u64,
        out_ids: u64,
        out_weights: u64,
        rows: usize,
        shared_weight: f32,
        unpadded: u64,
        quotas: u64,
        gathered: u64,
        cap_us: Option<u64>,
        stream: usize,
    ) -> PyResult<()> {
        let quotas = match cap_us.map(Duration::from_micros) {
            _ if quotas != 0 => Quotas::Given { address: quotas },
            Some(cap) if gathered != 0 => Quotas::Gathered { cap, address: gathered },
            Some(cap) => Quotas::Live { cap },
            None => Quotas::Own,
        };
        let call =
            Call { ids, weights, out_ids, out_weights, rows, shared_weight, unpadded, quotas };
        // SAFETY: `waterfill_rs.cuda` gives contiguous tensors of the runner's device, types and top-k,
        // outputs fresh from torch's allocator, and torch's current stream; `gathered` has `ranks * words` elements.
        cuda_guarded(|| unsafe { self.inner.launch(&call, stream) })
    }

    /// One launch on `stream` that chooses replicas: the board's call, from the counts at `gathered` if that is not 0. Ids go to
    /// `out`, int64 and past the shared experts if `moved`, else of the type given; the board's quotas go to `quotas` if that is
    /// not 0. If `words` is not 0, it only counts: int32 `[words]` there.
    #[allow(clippy::too_many_arguments)] // As `unsafe_launch_ptr`.
    fn unsafe_choose_replicas_ptr(
        &self,
        ids: u64,
        rows: usize,
        unpadded: u64,
        out: u64,
        moved: bool,
        quotas: u64,
        words: u64,
        table: u64,
        logical: u64,
        gathered: u64,
        cap_us: u64,
        stream: usize,
    ) -> PyResult<()> {
        let cap = Duration::from_micros(cap_us);
        let call =
            ReplicaCall { ids, rows, unpadded, out, moved, quotas, table, logical, gathered, cap };
        // SAFETY: as at `unsafe_launch_ptr`; `table` has the words of `waterfill_core::ReplicaTable` for the runner's shape,
        // `logical` an int64 for each expert, `quotas` an int32 for each rank, `words` and each rank's part of `gathered` as many
        // as `words` says.
        cuda_guarded(|| unsafe {
            match words {
                0 => self.inner.choose_replicas(&call, stream),
                _ => self.inner.count_replicas(&call, words, stream),
            }
        })
    }

    /// Move `count` ids up past the shared experts by one launch on `stream`: int64 `[count]` at `out`. By their primary
    /// replicas, int32 `[experts]` at `primaries`, checked by int64 `[experts]` at `logical`; 0: without.
    fn unsafe_move_up_ptr(
        &self,
        ids: u64,
        out: u64,
        count: usize,
        primaries: u64,
        logical: u64,
        stream: usize,
    ) -> PyResult<()> {
        let primaries = (primaries, logical);
        // SAFETY: `waterfill_rs.cuda` gives a contiguous tensor of the runner's device and type of ids, an int64 one of as
        // many elements fresh from torch's allocator, tables of these types and lengths, and torch's current stream.
        cuda_guarded(|| unsafe { self.inner.move_primaries_up(ids, out, count, primaries, stream) })
    }

    /// How calls with given or live quotas ended; waits for the stream.
    fn tally<'py>(&self, py: Python<'py>, stream: usize) -> PyResult<Bound<'py, PyDict>> {
        // SAFETY: `waterfill_rs.cuda` gives torch's current stream. Others may run while it is waited for.
        let ended = py.detach(|| cuda_guarded(|| unsafe { self.inner.tally(stream) }))?;
        let dict = PyDict::new(py);
        for (name, count) in ended.by_name() {
            dict.set_item(name, count)?;
        }
        Ok(dict)
    }
}
