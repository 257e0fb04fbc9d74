//! The layer's decision as one kernel: count, post to the board, take the plan, write the expanded tensors.
//!
//! A [`Runner`] holds the compiled kernel and its state on one device. [`Runner::launch`] makes one launch
//! on a borrowed stream: no allocation, no synchronisation, nothing that a CUDA graph could not capture. The
//! driver and NVRTC are opened when they are used; where one is missing, that is an [`Error`]. [`Runner::move_up`] launches a
//! second, small kernel, which moves routed ids past the shared experts and does nothing else.
//!
//! Ids and weights are those of `waterfill_core`'s `Assigner::expand`, bit for bit; quotas are the
//! planner's, the caller's, or those of `OwnPlanner` with `CostModel::Rows`.

mod args;
mod compiler;
mod driver;
#[cfg(test)]
mod emulated;
mod error;
mod installed;
mod runner;
mod shape;

pub use compiler::{Compiler, source};
pub use error::{Error, Result};
pub use runner::{Board, Call, Quotas, Runner, Tally};
pub use shape::{IdType, Shape, Variant, WeightType};
