//! Tensors cross as addresses: `waterfill_rs.torch` checks dtype, device and layout and keeps them alive.
//!
//! What a function can check here it does: null, alignment, and lengths against the shapes given. The types of the arguments
//! parse themselves, and their widths are told apart once, in [`with_ids!`] and [`with_rows!`].

use std::slice;

use pyo3::prelude::*;
use waterfill_core::{Assigner, Id, Placement, Rows, RowsMut, Weight, count, move_up, score};
use waterfill_cuda::{IdType, WeightType};

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
unsafe fn array<'a, T>(name: &str, address: usize, length: usize) -> PyResult<&'a [T]> {
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

/// The type of ids of so many bits.
pub fn id_type(bits: usize) -> PyResult<IdType> {
    let unknown = || refused(format!("topk_ids of {bits} bits: give int32 or int64"));
    IdType::of_bits(bits).ok_or_else(unknown)
}

/// The type of weights of so many bits.
pub fn weight_type(bits: usize) -> PyResult<WeightType> {
    let unknown = || refused(format!("topk_weights of {bits} bits: give float32 or bfloat16"));
    WeightType::of_bits(bits).ok_or_else(unknown)
}

/// Ids `[rows, top_k]`; in Python `(address, rows, top_k, bits)`.
#[derive(Clone, Copy)]
pub struct Ids {
    address: usize,
    pub rows: usize,
    pub top_k: usize,
    pub kind: IdType,
}

impl FromPyObject<'_, '_> for Ids {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let (address, rows, top_k, bits) = object.extract::<(usize, usize, usize, usize)>()?;
        Ok(Self { address, rows, top_k, kind: id_type(bits)? })
    }
}

impl Ids {
    /// # Safety
    /// As [`array()`], for `rows * top_k` elements.
    pub unsafe fn get<'a, I: Id>(self) -> PyResult<&'a [I]> {
        // SAFETY: the caller's promise, passed on.
        unsafe { array("topk_ids", self.address, self.rows * self.top_k) }
    }
}

/// Weights beside [`Ids`], of their shape; in Python `(address, bits)`.
#[derive(Clone, Copy)]
pub struct Weights {
    address: usize,
    pub kind: WeightType,
}

impl FromPyObject<'_, '_> for Weights {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let (address, bits) = object.extract::<(usize, usize)>()?;
        Ok(Self { address, kind: weight_type(bits)? })
    }
}

/// Where expanded ids and weights `[rows, top_k + 1]` go, of the types of the routed ones; in Python `(ids, weights)`.
#[derive(Clone, Copy, FromPyObject)]
pub struct Expanded(usize, usize);

/// Ids and weights of one call, and where they go.
#[derive(Clone, Copy)]
pub struct Call {
    pub ids: Ids,
    pub weights: Weights,
    pub out: Expanded,
}

impl Call {
    /// # Safety
    /// At the addresses are live contiguous arrays of these shapes, of `I` and `W`. Nobody else writes the inputs for `'a`,
    /// nor reads or writes the outputs.
    pub unsafe fn rows<'a, I: Id, W: Weight>(
        self,
    ) -> PyResult<(Rows<'a, I, W>, RowsMut<'a, I, W>)> {
        let Ids { rows, top_k, .. } = self.ids;
        let (routed, expanded) = (rows * top_k, rows * (top_k + 1));
        let Expanded(out_ids, out_weights) = self.out;
        // SAFETY: the caller's promise, passed on.
        unsafe {
            let ids = self.ids.get::<I>()?;
            let weights = array("topk_weights", self.weights.address, routed)?;
            let out_ids = array_mut("out_ids", out_ids, expanded)?;
            let out_weights = array_mut("out_weights", out_weights, expanded)?;
            Ok((Rows { ids, weights, top_k }, RowsMut { ids: out_ids, weights: out_weights }))
        }
    }
}

/// The expression with `$I` as the type of the ids.
macro_rules! with_ids {
    ($ids:expr, $I:ident => $body:expr) => {
        match $ids.kind {
            waterfill_cuda::IdType::I32 => {
                type $I = i32;
                $body
            }
            waterfill_cuda::IdType::I64 => {
                type $I = i64;
                $body
            }
        }
    };
}

/// The expression with `$I` as the type of a [`Call`]'s ids and `$W` as that of its weights.
macro_rules! with_rows {
    ($call:expr, $I:ident, $W:ident => $body:expr) => {
        $crate::tensors::with_ids!($call.ids, $I => match $call.weights.kind {
            waterfill_cuda::WeightType::F32 => {
                type $W = f32;
                $body
            }
            waterfill_cuda::WeightType::Bf16 => {
                type $W = waterfill_core::Bf16;
                $body
            }
        })
    };
}

pub(crate) use {with_ids, with_rows};

// The tensors stay alive in the caller, so each function lets other threads run meanwhile.

/// Counts `[P]`, visits `[R]` and the number of tokens of ids `[rows, top_k]`.
#[pyfunction]
fn unsafe_count_ptr(
    py: Python<'_>,
    ids: Ids,
    physical_experts: usize,
    ranks: usize,
) -> PyResult<(Vec<u32>, Vec<u32>, u32)> {
    py.detach(|| {
        with_ids!(ids, I => {
            // SAFETY: `waterfill_rs.torch` gives a live contiguous CPU tensor of this shape and dtype.
            let values = unsafe { ids.get::<I>() }?;
            guarded(|| {
                let placement = Placement::contiguous(ranks, physical_experts)?;
                let (mut counts, mut visits) = (vec![0; physical_experts], vec![0; ranks]);
                let tokens = count(&placement, values, ids.top_k, &mut counts, &mut visits)?;
                Ok((counts, visits, tokens))
            })
        })
    })
}

/// Write the shared rank of each row, `[rows]` int32 at `shared_rank`.
#[pyfunction]
fn unsafe_assign_ptr(
    py: Python<'_>,
    ids: Ids,
    quotas: Vec<u32>,
    physical_experts: usize,
    rank: usize,
    shared_rank: usize,
) -> PyResult<()> {
    py.detach(|| {
        with_ids!(ids, I => {
            // SAFETY: `waterfill_rs.torch` gives live contiguous CPU tensors of these shapes and dtypes, the output freshly
            // made and shared with nobody.
            let (values, out) =
                unsafe { (ids.get::<I>()?, array_mut("shared_rank", shared_rank, ids.rows)?) };
            guarded(|| {
                let placement = Placement::contiguous(quotas.len(), physical_experts)?;
                Assigner::new().assign(&placement, rank, values, ids.top_k, &quotas, out)
            })
        })
    })
}

/// Write ids and weights `[rows, top_k + 1]` from `[rows, top_k]` and this rank's quotas `[ranks]`.
#[pyfunction]
#[allow(clippy::too_many_arguments)] // One caller, `waterfill_rs.torch`, in the order of the shapes.
fn unsafe_expand_ptr(
    py: Python<'_>,
    ids: Ids,
    weights: Weights,
    out: Expanded,
    quotas: Vec<u32>,
    physical_experts: usize,
    rank: usize,
    shared_weight: f32,
) -> PyResult<()> {
    let call = Call { ids, weights, out };
    py.detach(|| {
        with_rows!(call, I, W => {
            // SAFETY: `waterfill_rs.torch` gives live contiguous CPU tensors of these shapes and dtypes, the outputs freshly
            // made and shared with nobody.
            let (routed, out) = unsafe { call.rows::<I, W>() }?;
            guarded(|| {
                let placement = Placement::contiguous(quotas.len(), physical_experts)?;
                Assigner::new().expand(&placement, rank, routed, &quotas, shared_weight, out)
            })
        })
    })
}

/// Write ids moved up past the shared experts, `[rows, top_k]` int64 at `out`.
#[pyfunction]
fn unsafe_move_up_ptr(
    py: Python<'_>,
    ids: Ids,
    out: usize,
    physical_experts: usize,
    ranks: usize,
) -> PyResult<()> {
    py.detach(|| {
        with_ids!(ids, I => {
            // SAFETY: `waterfill_rs.torch` gives live contiguous CPU tensors of these shapes and dtypes, the output freshly
            // made and shared with nobody.
            let (values, out) =
                unsafe { (ids.get::<I>()?, array_mut("out", out, ids.rows * ids.top_k)?) };
            let placement = || Placement::contiguous(ranks, physical_experts);
            guarded(|| move_up(&placement()?, values, ids.top_k, out))
        })
    })
}

/// `(extra_copies, extra_messages)` of one source's shared ranks, `[rows]` int32.
#[pyfunction]
fn unsafe_traffic_ptr(
    py: Python<'_>,
    ids: Ids,
    shared_rank: usize,
    physical_experts: usize,
    ranks: usize,
    rank: usize,
) -> PyResult<(u64, u64)> {
    py.detach(|| {
        with_ids!(ids, I => {
            // SAFETY: `waterfill_rs.torch` gives live contiguous CPU tensors of these shapes and dtypes.
            let (values, shared) =
                unsafe { (ids.get::<I>()?, array("shared_rank", shared_rank, ids.rows)?) };
            guarded(|| {
                let placement = Placement::contiguous(ranks, physical_experts)?;
                let traffic = score::traffic(&placement, rank, values, ids.top_k, shared)?;
                Ok((traffic.extra_copies, traffic.extra_messages))
            })
        })
    })
}
