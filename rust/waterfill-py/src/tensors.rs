//! Tensors cross as addresses: `waterfill_rs.torch` checks dtype, device and layout and keeps them alive.
//!
//! What a function can check here it does: null, alignment, and lengths against the shapes given.

use std::slice;

use pyo3::prelude::*;
use waterfill_core::{Assigner, Bf16, Id, Placement, Rows, RowsMut, Weight, count, move_up, score};

use crate::error::{guarded, refused};

#[allow(clippy::unsafe_removed_from_name)] // By the `wrap_pyfunction` macro, not by us.
pub fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(unsafe_count_ptr, module)?)?;
    module.add_function(wrap_pyfunction!(unsafe_assign_ptr, module)?)?;
    module.add_function(wrap_pyfunction!(unsafe_expand_ptr, module)?)?;
    module.add_function(wrap_pyfunction!(unsafe_move_up_ptr, module)?)?;
    module.add_function(wrap_pyfunction!(unsafe_traffic_ptr, module)?)
}

/// Null and misaligned addresses are refused; an empty array may have any address.
fn check_address<T>(name: &str, address: usize, length: usize) -> PyResult<()> {
    if length > 0 && (address == 0 || !address.is_multiple_of(align_of::<T>())) {
        let align = align_of::<T>();
        return Err(refused(format!(
            "{name}: address {address:#x} of {length} elements: give one aligned to {align} bytes"
        )));
    }
    Ok(())
}

/// # Safety
/// `address` is that of `length` initialised elements that nobody writes for `'a`.
pub unsafe fn array<'a, T>(name: &str, address: usize, length: usize) -> PyResult<&'a [T]> {
    check_address::<T>(name, address, length)?;
    if length == 0 {
        return Ok(&[]);
    }
    // SAFETY: not null, aligned (checked above); the rest is the caller's promise.
    Ok(unsafe { slice::from_raw_parts(address as *const T, length) })
}

/// # Safety
/// `address` is that of `length` elements that nobody else reads or writes for `'a`.
pub unsafe fn array_mut<'a, T>(name: &str, address: usize, length: usize) -> PyResult<&'a mut [T]> {
    check_address::<T>(name, address, length)?;
    if length == 0 {
        return Ok(&mut []);
    }
    // SAFETY: not null, aligned (checked above); the rest is the caller's promise.
    Ok(unsafe { slice::from_raw_parts_mut(address as *mut T, length) })
}

/// Ids `[rows, top_k]` at an address, of the width that the function is told.
#[derive(Clone, Copy)]
pub struct Ids {
    pub address: usize,
    pub rows: usize,
    pub top_k: usize,
}

impl Ids {
    /// From `(address, rows, top_k, bits)`, and the bits.
    pub fn of((address, rows, top_k, bits): (usize, usize, usize, usize)) -> (Self, usize) {
        (Self { address, rows, top_k }, bits)
    }

    /// # Safety
    /// As [`array()`], for `rows * top_k` elements.
    pub unsafe fn get<'a, I: Id>(self) -> PyResult<&'a [I]> {
        // SAFETY: the caller's promise, passed on.
        unsafe { array("topk_ids", self.address, self.rows * self.top_k) }
    }
}

pub fn unknown_bits(name: &str, bits: usize, known: &str) -> PyErr {
    refused(format!("{name} of {bits} bits: give {known}"))
}

/// Counts `[P]`, visits `[R]` and the number of tokens of ids `[rows, top_k]`.
#[pyfunction]
fn unsafe_count_ptr(
    py: Python<'_>,
    ids: (usize, usize, usize, usize),
    physical_experts: usize,
    ranks: usize,
) -> PyResult<(Vec<u32>, Vec<u32>, u32)> {
    fn run<I: Id>(
        ids: Ids,
        physical_experts: usize,
        ranks: usize,
    ) -> PyResult<(Vec<u32>, Vec<u32>, u32)> {
        // SAFETY: `waterfill_rs.torch` gives a live contiguous CPU tensor of this shape and dtype.
        let values = unsafe { ids.get::<I>() }?;
        guarded(|| {
            let placement = Placement::contiguous(ranks, physical_experts)?;
            let (mut counts, mut visits) = (vec![0; physical_experts], vec![0; ranks]);
            let tokens = count(&placement, values, ids.top_k, &mut counts, &mut visits)?;
            Ok((counts, visits, tokens))
        })
    }
    let (address, rows, top_k, bits) = ids;
    let ids = Ids { address, rows, top_k };
    // The tensors stay alive in the caller; other threads may run while we count.
    py.detach(|| match bits {
        32 => run::<i32>(ids, physical_experts, ranks),
        64 => run::<i64>(ids, physical_experts, ranks),
        _ => Err(unknown_bits("topk_ids", bits, "int32 or int64")),
    })
}

/// Write the shared rank of each row, `[rows]` int32 at `shared_rank`.
#[pyfunction]
fn unsafe_assign_ptr(
    py: Python<'_>,
    ids: (usize, usize, usize, usize),
    quotas: Vec<u32>,
    physical_experts: usize,
    rank: usize,
    shared_rank: usize,
) -> PyResult<()> {
    fn run<I: Id>(
        ids: Ids,
        quotas: &[u32],
        experts: usize,
        rank: usize,
        out: usize,
    ) -> PyResult<()> {
        // SAFETY: `waterfill_rs.torch` gives live contiguous CPU tensors of these shapes and dtypes,
        // the output freshly made and shared with nobody.
        let (values, out) = unsafe { (ids.get::<I>()?, array_mut("shared_rank", out, ids.rows)?) };
        guarded(|| {
            let placement = Placement::contiguous(quotas.len(), experts)?;
            Assigner::new().assign(&placement, rank, values, ids.top_k, quotas, out)
        })
    }
    let (address, rows, top_k, bits) = ids;
    let ids = Ids { address, rows, top_k };
    // The tensors stay alive in the caller; other threads may run meanwhile.
    py.detach(|| match bits {
        32 => run::<i32>(ids, &quotas, physical_experts, rank, shared_rank),
        64 => run::<i64>(ids, &quotas, physical_experts, rank, shared_rank),
        _ => Err(unknown_bits("topk_ids", bits, "int32 or int64")),
    })
}

/// Addresses of one expansion: weights in; ids and weights out.
#[derive(Clone, Copy)]
struct Expansion<'a> {
    ids: Ids,
    weights: usize,
    quotas: &'a [u32],
    out_ids: usize,
    out_weights: usize,
    physical_experts: usize,
    rank: usize,
    shared_weight: f32,
}

impl Expansion<'_> {
    fn run<I: Id, W: Weight>(self) -> PyResult<()> {
        let Ids { rows, top_k, .. } = self.ids;
        let expanded = rows * (top_k + 1);
        // SAFETY: `waterfill_rs.torch` gives live contiguous CPU tensors of these shapes and dtypes,
        // the outputs freshly made and shared with nobody.
        let (ids, weights, out_ids, out_weights) = unsafe {
            (
                self.ids.get::<I>()?,
                array::<W>("topk_weights", self.weights, rows * top_k)?,
                array_mut::<I>("out_ids", self.out_ids, expanded)?,
                array_mut::<W>("out_weights", self.out_weights, expanded)?,
            )
        };
        guarded(|| {
            let placement = Placement::contiguous(self.quotas.len(), self.physical_experts)?;
            let routed = Rows { ids, weights, top_k };
            let out = RowsMut { ids: out_ids, weights: out_weights };
            let weight = self.shared_weight;
            Assigner::new().expand(&placement, self.rank, routed, self.quotas, weight, out)
        })
    }
}

/// Write ids and weights `[rows, top_k + 1]` from `[rows, top_k]` and this rank's quotas `[ranks]`.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // One caller, `waterfill_rs.torch`, in the order of the shapes.
fn unsafe_expand_ptr(
    py: Python<'_>,
    ids: (usize, usize, usize, usize),
    weights: (usize, usize),
    quotas: Vec<u32>,
    out_ids: usize,
    out_weights: usize,
    physical_experts: usize,
    rank: usize,
    shared_weight: f32,
) -> PyResult<()> {
    let (address, rows, top_k, id_bits) = ids;
    let (weights, weight_bits) = weights;
    let ids = Ids { address, rows, top_k };
    let quotas = &quotas[..];
    let call = Expansion {
        ids,
        weights,
        quotas,
        out_ids,
        out_weights,
        physical_experts,
        rank,
        shared_weight,
    };
    // The tensors stay alive in the caller; other threads may run meanwhile.
    py.detach(|| match (id_bits, weight_bits) {
        (32, 32) => call.run::<i32, f32>(),
        (32, 16) => call.run::<i32, Bf16>(),
        (64, 32) => call.run::<i64, f32>(),
        (64, 16) => call.run::<i64, Bf16>(),
        (32 | 64, _) => Err(unknown_bits("topk_weights", weight_bits, "float32 or bfloat16")),
        _ => Err(unknown_bits("topk_ids", id_bits, "int32 or int64")),
    })
}

/// Write ids moved up past the shared experts, `[rows, top_k]` int64 at `out`.
#[pyfunction]
fn unsafe_move_up_ptr(
    py: Python<'_>,
    ids: (usize, usize, usize, usize),
    out: usize,
    physical_experts: usize,
    ranks: usize,
) -> PyResult<()> {
    fn run<I: Id>(ids: Ids, out: usize, experts: usize, ranks: usize) -> PyResult<()> {
        // SAFETY: `waterfill_rs.torch` gives live contiguous CPU tensors of these shapes and dtypes,
        // the output freshly made and shared with nobody.
        let (values, out) =
            unsafe { (ids.get::<I>()?, array_mut::<i64>("out", out, ids.rows * ids.top_k)?) };
        guarded(|| move_up(&Placement::contiguous(ranks, experts)?, values, ids.top_k, out))
    }
    let (ids, bits) = Ids::of(ids);
    // The tensors stay alive in the caller; other threads may run meanwhile.
    py.detach(|| match bits {
        32 => run::<i32>(ids, out, physical_experts, ranks),
        64 => run::<i64>(ids, out, physical_experts, ranks),
        _ => Err(unknown_bits("topk_ids", bits, "int32 or int64")),
    })
}

/// `(extra_copies, extra_messages)` of one source's shared ranks, `[rows]` int32.
#[pyfunction]
fn unsafe_traffic_ptr(
    py: Python<'_>,
    ids: (usize, usize, usize, usize),
    shared_rank: usize,
    physical_experts: usize,
    ranks: usize,
    rank: usize,
) -> PyResult<(u64, u64)> {
    fn run<I: Id>(
        ids: Ids,
        shared: usize,
        experts: usize,
        ranks: usize,
        rank: usize,
    ) -> PyResult<(u64, u64)> {
        // SAFETY: `waterfill_rs.torch` gives live contiguous CPU tensors of these shapes and dtypes.
        let (values, shared) =
            unsafe { (ids.get::<I>()?, array::<i32>("shared_rank", shared, ids.rows)?) };
        guarded(|| {
            let placement = Placement::contiguous(ranks, experts)?;
            let traffic = score::traffic(&placement, rank, values, ids.top_k, shared)?;
            Ok((traffic.extra_copies, traffic.extra_messages))
        })
    }
    let (address, rows, top_k, bits) = ids;
    let ids = Ids { address, rows, top_k };
    // The tensors stay alive in the caller; other threads may run meanwhile.
    py.detach(|| match bits {
        32 => run::<i32>(ids, shared_rank, physical_experts, ranks, rank),
        64 => run::<i64>(ids, shared_rank, physical_experts, ranks, rank),
        _ => Err(unknown_bits("topk_ids", bits, "int32 or int64")),
    })
}
