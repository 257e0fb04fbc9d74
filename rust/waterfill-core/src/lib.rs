//! Exact, deterministic placement of shared-expert rows over the ranks of an expert-parallel group.
//!
//! A mixture-of-experts layer ends when its slowest rank ends. Every rank holds the shared expert, so
//! each token's shared row may run anywhere: [`Planner::live`] finds how many rows each source should
//! send to each rank, from the live counts of that very layer.
//!
//! ```
//! use waterfill_core::{CostModel, Placement, Plan, Planner, Problem, Routed};
//!
//! let placement = Placement::contiguous(4, 16)?;
//! let mut plan = Plan::new();
//! let problem = Problem {
//!     placement: &placement,
//!     cost: &CostModel::Rows,
//!     routed: Routed::PerRank(&[90, 60, 50, 40]),
//!     tokens: &[10, 10, 10, 10],
//!     visits: None,
//!     eligible: None,
//! };
//! Planner::new().live(&problem, &mut plan)?;
//! assert_eq!(plan.optimum(), 90); // the hottest rank's routed rows: nobody ends later
//! assert_eq!(plan.shared_rows()[0], 0); // and it runs no shared row
//! # Ok::<(), waterfill_core::Error>(())
//! ```
#![forbid(unsafe_code)]

mod assign;
pub mod bids;
mod check;
mod cost;
mod count;
mod error;
mod expand;
mod expander;
mod ids;
mod joint;
mod level;
#[cfg(feature = "oracle")]
pub mod oracle;
mod own;
mod placement;
mod plan;
mod problem;
mod replicas;
pub mod score;
mod single;
mod split;
mod transport;

pub use assign::{Assigner, NO_RANK};
pub use check::{check_length, check_rank};
pub use cost::{CostModel, Roofline, Table};
pub use count::count;
pub use error::{Error, Result};
pub use expand::{Rows, RowsMut, expand, move_up};
pub use expander::Expander;
pub use ids::{Bf16, Id, Weight};
pub use own::{HALF_TRUSTED, LEAST_TENTHS, OwnCounts, OwnPlanner};
pub use placement::{MAX_EXPERTS, MAX_RANKS, Placement};
pub use plan::{Plan, Planner, WEIGHTS_AS_ROWS};
pub use problem::{Problem, Routed};
pub use replicas::{NO_JOB, ReplicaAssigner, ReplicaQuotas, ReplicaTable, choose_replicas};
pub use transport::Transfer;
