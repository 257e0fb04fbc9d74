//! The board on which expert-parallel ranks post one layer's counts and read the plan made of them.
//!
//! Every word of the board has one writer and tells by itself to which call it belongs, so there is no
//! lock, no fence and no torn read. Every wait has a cap; past it a rank goes on with its own counts.
//!
//! ```
//! use std::{sync::Arc, time::Duration};
//! use waterfill_board::{BoardPlanner, Heap, Pace, PlannerThread, Port, Posted, Shape, Outcome};
//! use waterfill_core::CostModel;
//!
//! let shape = Shape::new(1, 4)?;
//! let board = Arc::new(Heap::new(shape));
//! let patience = Duration::from_millis(100);
//! let planner = BoardPlanner::new(Arc::clone(&board), shape, CostModel::Rows, patience)?;
//! let _thread = PlannerThread::spawn(planner, Pace::Spin(None)).unwrap();
//! let mut port = Port::new(board, shape, CostModel::Rows, 0)?;
//! let posted = Posted { tokens: 3, visits: &[3], counts: &[3, 1, 1, 1] };
//! let mut quotas = [0];
//! let outcome = port.exchange(posted, Duration::from_secs(10), &mut quotas)?;
//! assert_eq!((outcome, quotas), (Outcome::Live, [3]));
//! # Ok::<(), waterfill_board::Error>(())
//! ```
#![deny(unsafe_code)]
#![cfg_attr(any(loom, shuttle), deny(clippy::disallowed_types))]

mod error;
mod gathered;
mod header;
mod histogram;
mod layout;
mod maps;
mod outcome;
mod planner;
mod port;
mod presence;
mod region;
mod segment;
mod snapshot;
mod sync;
mod tally;
mod thread;
mod wait;
mod word;

pub use error::{Error, Result};
pub use histogram::Waits;
pub use layout::{PLANNER_TALLY, RANK_TALLY, RING, Shape};
pub use outcome::{Ended, Outcome};
pub use planner::BoardPlanner;
pub use port::{BREAK_AFTER, MOST_SELDOM, Port, Posted};
pub use presence::{End, Held, Presence, leave_in_child};
pub use region::{Heap, Region};
pub use segment::Segment;
pub use snapshot::{Observer, SNAPSHOT_VERSION, Snapshot};
pub use tally::{Published, Tally};
pub use thread::{Pace, PlannerThread, PlannerWatch};
pub use word::Sequence;

/// Single words of a board, for tests that write and read nothing else. For use there is [`Port`].
#[cfg(feature = "testing")]
pub mod testing {
    pub use crate::word::{load, sequence, store};
}
