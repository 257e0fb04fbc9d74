//! Ids of experts and weights, as they come in a tensor of either width, and what of them is refused.

use std::ops::BitOr;

use crate::check::check_length;
use crate::error::{Error, Result};
use crate::placement::Placement;

/// An expert id: `i32` or `i64`. A negative one names no expert.
pub trait Id: Copy + Ord + Into<i64> + BitOr<Output = Self> + Send + Sync + 'static {
    /// The id of no expert.
    const NONE: Self;
    /// The low 32 bits, all that the id of an expert needs; `NO_EXPERT` or more for no expert.
    fn low(self) -> u32;
    /// An id from a value below 2^31.
    fn from_low(value: u32) -> Self;
    /// `self - other`, wrapping.
    fn minus(self, other: Self) -> Self;
}

/// Ids of experts are below it, in their low 32 bits.
pub(crate) const NO_EXPERT: u32 = 1 << 31;

impl Id for i32 {
    const NONE: Self = -1;
    #[inline(always)]
    fn low(self) -> u32 {
        self as u32
    }
    #[inline(always)]
    fn from_low(value: u32) -> Self {
        value as Self
    }
    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        self.wrapping_sub(other)
    }
}

impl Id for i64 {
    const NONE: Self = -1;
    #[inline(always)]
    fn low(self) -> u32 {
        // The sign over all bits: a negative value may have the low bits of an expert.
        (self | self >> 63) as u32
    }
    #[inline(always)]
    fn from_low(value: u32) -> Self {
        Self::from(value)
    }
    #[inline(always)]
    fn minus(self, other: Self) -> Self {
        self.wrapping_sub(other)
    }
}

/// The weight of an expert in a token's sum: `f32` or [`Bf16`].
pub trait Weight: Copy + Send + Sync + 'static {
    /// The weight of no expert.
    const ZERO: Self;
    /// The nearest weight, ties to even.
    fn from_f32(value: f32) -> Self;
}

impl Weight for f32 {
    const ZERO: Self = 0.0;
    fn from_f32(value: f32) -> Self {
        value
    }
}

/// A bfloat16, by its bits: the upper half of a `f32`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl Weight for Bf16 {
    const ZERO: Self = Self(0);
    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        if value.is_nan() {
            // Rounding could carry a NaN into infinity; a quiet NaN stays one.
            return Self((bits >> 16) as u16 | 0x40);
        }
        let round_to_even = 0x7fff + ((bits >> 16) & 1);
        Self(((bits + round_to_even) >> 16) as u16)
    }
}

/// Division of values below 2^31 by one divisor, as a multiplication that vectorises.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Divisor {
    multiplier: u64,
    shift: u32,
}

impl Divisor {
    /// `divisor` is from 1 to 2^31.
    pub(crate) fn new(divisor: usize) -> Self {
        // ceil(2^shift / divisor) is off by less than one part in 2^31 of a quotient, which cannot
        // carry a value below 2^31 over the next multiple of the divisor; and it fits 32 bits.
        let divisor = divisor as u64;
        let shift = 31 + divisor.next_power_of_two().trailing_zeros();
        Self { multiplier: (1u64 << shift).div_ceil(divisor), shift }
    }

    #[inline(always)]
    pub(crate) fn divide(self, value: u32) -> u32 {
        ((u64::from(value) * self.multiplier) >> self.shift) as u32
    }
}

/// The number of rows that `ids` values make at `top_k` a row.
pub(crate) fn check_rows(ids: usize, top_k: usize) -> Result<usize> {
    if top_k == 0 {
        return Err(Error::Length { name: "a row of ids", found: 0, expected: 1 });
    }
    let rows = ids / top_k;
    check_length("ids", ids, rows * top_k)?;
    Ok(rows)
}

/// No id is at or above the number of physical experts.
pub(crate) fn check_ids<I: Id>(placement: &Placement, ids: &[I], top_k: usize) -> Result<()> {
    let physical_experts = placement.physical_experts();
    let last = I::from_low(physical_experts as u32 - 1);
    // A difference is negative for an id above the last one, and by overflow for some far below zero,
    // which the search tells apart. Two instructions an id, where a maximum takes twice that.
    if ids.iter().fold(last, |signs, &id| signs | last.minus(id)) > I::NONE {
        return Ok(());
    }
    let Some(first) = ids.iter().position(|&id| id.into() >= physical_experts as i64) else {
        return Ok(());
    };
    Err(Error::ExpertId {
        row: first / top_k,
        column: first % top_k,
        value: ids[first].into(),
        physical_experts,
    })
}
