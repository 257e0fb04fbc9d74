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
//!
//! # Replicas
//! With redundant experts, some experts have several *replicas*, each a physical expert of its own.
//! [`Planner::joint`] splits their rows, so that the slowest rank has the fewest, and [`Planner::single_replica`] puts all
//! rows of an expert on one replica, so that no rank loads more weights than it must. [`Planner::replicas`] takes the faster
//! of the two. None of this needs sglang: a server gathers counts, plans, and each source names a replica for each of its rows.
//!
//! ```
//! use waterfill_core::{
//!     CostModel, Plan, Planner, Problem, ReplicaCounts, ReplicaQuotas, ReplicaTable, Routed,
//!     choose_replicas,
//! };
//!
//! // Two ranks of three physical experts, which are four logical ones: experts 0 and 1 are on both ranks.
//! let table = ReplicaTable::new(2, &[0, 1, 2, 3, 0, 1])?;
//! // Each source's rows by physical expert, [2, 6]. All rows of expert 0 go to its replica on rank 0.
//! let counts = [500, 0, 200, 100, 0, 0, 300, 0, 100, 200, 0, 0];
//! let routed: Vec<u32> = (0..6).map(|physical| counts[physical] + counts[6 + physical]).collect();
//! let problem = Problem {
//!     placement: table.placement(), // or Placement::replicated, for plans alone
//!     cost: &CostModel::Rows,
//!     routed: Routed::PerExpert(&routed),
//!     tokens: &[0, 0], // no shared rows: they run elsewhere
//!     visits: None,
//!     eligible: None,
//! };
//! let mut plan = Plan::new();
//! Planner::new().joint(&problem, &mut plan)?;
//! assert_eq!(plan.optimum(), 700); // as routed, rank 0 has 1,100 rows
//! assert_eq!(plan.replica_rows(), [400, 0, 300, 300, 400, 0]);
//!
//! // Each source's part: first rows that stay on its own rank. Replicas of expert 0, then of expert 1.
//! let (mut of_source, mut jobs) = (ReplicaCounts::new(), Vec::new());
//! for counts in counts.chunks_exact(6) {
//!     of_source.reduce(table.placement(), counts)?;
//!     jobs.extend_from_slice(of_source.jobs()); // its rows of experts 0 and 1
//! }
//! let mut quotas = ReplicaQuotas::new();
//! quotas.divide(&table, &jobs, plan.replica_rows())?;
//! assert_eq!(quotas.of(0), [400, 100, 0, 0]);
//! assert_eq!(quotas.of(1), [0, 300, 0, 0]);
//!
//! // And each row's: physical experts 0 and 4 are the same logical one.
//! let mut ids = vec![0; 500];
//! choose_replicas(&table, quotas.of(0), &mut ids, 1)?;
//! assert_eq!(ids.iter().filter(|&&id| id == 4).count(), 100);
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
mod replica_counts;
mod replicas;
pub mod score;
mod single;
mod split;
mod transport;
mod workspace;

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
pub use replica_counts::ReplicaCounts;
pub use replicas::{
    NO_JOB, Primaries, ReplicaAssigner, ReplicaQuotas, ReplicaTable, choose_replicas,
};
pub use transport::Transfer;
