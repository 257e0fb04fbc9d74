//! The layer's decision as one kernel: count, post to the board, take the plan, write the expanded tensors.
//!
//! A [`Runner`] holds the compiled kernel and its state on one device. [`Runner::launch`] makes one launch
//! on a borrowed stream: no allocation, no synchronisation, nothing that a CUDA graph could not capture. The
//! driver and NVRTC are opened when they are used; where one is missing, that is an [`Error`]. [`Runner::move_up`] launches a
//! second, small kernel, which moves routed ids past the shared experts and does nothing else. [`Runner::choose_replicas`] launches a
//! third one, which makes the call where plans choose among the replicas of redundant experts.
//!
//! Ids and weights are those of `waterfill_core`'s `Assigner::expand`, bit for bit; quotas are the
//! planner's, the caller's, or those of `OwnPlanner` with `CostModel::Rows`.

mod args;
mod compiler;
mod driver;
mod error;
mod installed;
mod replicas;
mod runner;
mod shape;
mod source;

pub use compiler::Compiler;
pub use error::{Error, Result};
pub use replicas::ReplicaCall;
pub use runner::{Call, Quotas, Runner};
pub use shape::{IdType, Shape, Variant, WeightType};
pub use source::source;

/// With what the tests without a GPU (`tests/emulated`) launch the kernels: the runner's own. No part of the interface.
#[doc(hidden)]
pub mod internal {
    pub use crate::args::{
        Args, COUNT, GIVEN, LIVE, MoveArgs, OWN, ReplicaArgs, State, common_args, launch_of,
        launch_of_ids, launch_of_replicas, move_args, replica_args, weight_bits, with_board,
        with_cut,
    };
    pub use crate::driver::Launch;
    pub use crate::shape::{
        Geometry, MAX_EXPERTS, MAX_ROWS, MAX_TOP_K, MOVE_THREADS, ReplicaGeometry,
    };
    pub use crate::source::{FILES, assertions, main_file, values};
}
