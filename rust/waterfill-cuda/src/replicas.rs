//! Calls on a board with redundant experts: the kernel that counts, posts, waits for the plan, and chooses replicas.

use std::time::Duration;

use crate::args::{Args, COUNT, LIVE, ReplicaArgs, launch_of_replicas, replica_args};
use crate::driver::Stream;
use crate::error::{Error, Result};
use crate::runner::{Runner, nanoseconds};
use crate::shape::ReplicaGeometry;

/// One call of [`Runner::choose_replicas`]: addresses on the device, and what is at them.
#[derive(Clone, Copy, Debug)]
pub struct ReplicaCall {
    /// `[rows, top_k]` ids.
    pub ids: u64,
    /// Rows.
    pub rows: usize,
    /// One 32-bit integer: rows at or past it are padding. 0: there is none.
    pub unpadded: u64,
    /// `[rows, top_k]` ids with replicas chosen: of the shape's type, or of 64 bits if `moved`.
    pub out: u64,
    /// Whether ids go out past the shared experts, as [`Runner::move_up`] moves them. So it is where the shared rows are not
    /// routed: then no tokens and no visits are posted.
    pub moved: bool,
    /// `[R]` 32-bit words that the board's quotas go to, for [`Quotas::Given`](crate::Quotas::Given) of the launch that follows;
    /// all ones without a plan, which add up to no tokens. 0: nowhere.
    pub quotas: u64,
    /// The layer's table, `waterfill_core::ReplicaTable::words`. Its fingerprint is 0 where no replicas are to be chosen.
    pub table: u64,
    /// `[P]` 64-bit integers, the logical expert of each physical one by the server's own map: an id is only replaced by one of
    /// the same. 0: the table is trusted.
    pub logical: u64,
    /// `[R, words]` 32-bit words, what [`Runner::count_replicas`] wrote on each rank: posted for all of them. 0: this rank posts
    /// its own.
    pub gathered: u64,
    /// The longest wait for the plan.
    pub cap: Duration,
}

impl Runner {
    /// Launch one call on `stream`: count, post, wait for the plan, and write the ids with replicas chosen as it says.
    ///
    /// Without a plan, or with one for another map than the table's, all ids stay. Padding is -1 where ids are not moved.
    /// As [`launch`](Self::launch), a graph can capture it. It makes the board's call in the place of a launch with live quotas.
    ///
    /// # Errors
    /// A shape without redundant experts, no board, more rows than fit, or what the driver refuses.
    ///
    /// # Safety
    /// As [`launch`](Self::launch), for the addresses of [`ReplicaCall`].
    pub unsafe fn choose_replicas(&self, call: &ReplicaCall, stream: usize) -> Result<()> {
        if !self.has_board {
            return Err(Error::Argument(
                "a choice of replicas without a board: attach one first".into(),
            ));
        }
        let args = Args { mode: LIVE, words: call.gathered, ..self.args };
        // SAFETY: the caller's promise.
        unsafe { self.run_replicas(call, args, stream) }
    }

    /// Write what such a call would post, [`words`](Self::words) 32-bit words at `words`, and nothing else: for a collective that
    /// brings all ranks' to [`ReplicaCall::gathered`].
    ///
    /// # Errors
    /// As there, but it needs no board.
    ///
    /// # Safety
    /// As there; outputs, quotas and the server's map are not looked at.
    pub unsafe fn count_replicas(
        &self,
        call: &ReplicaCall,
        words: u64,
        stream: usize,
    ) -> Result<()> {
        let args = Args { mode: COUNT, words, ..self.args };
        // SAFETY: the caller's promise.
        unsafe { self.run_replicas(call, args, stream) }
    }

    /// # Safety
    /// As [`choose_replicas`](Self::choose_replicas), or [`count_replicas`](Self::count_replicas) by the mode.
    unsafe fn run_replicas(&self, call: &ReplicaCall, args: Args, stream: usize) -> Result<()> {
        let cut = self.cut_replicas(call.rows)?;
        let (Some(kernel), Some(state)) = (&self.kernels(cut.blocks).choose, &self.replica_state)
        else {
            return Err(Error::Argument(
                "a choice of replicas for a shape without redundant experts: say how many there are".into(),
            ));
        };
        let args = Args {
            ids: call.ids,
            rows: call.rows as u32,
            unpadded: call.unpadded,
            cap_ns: nanoseconds(call.cap),
            state: state.address(),
            ..args
        };
        let args = ReplicaArgs {
            table: call.table,
            logical: call.logical,
            out: call.out,
            quotas: call.quotas,
            moved: call.moved.into(),
            ..replica_args(args, &cut)
        };
        let _current = self.device.current()?;
        // SAFETY: the kernel's parameter is `ReplicaArgs`; its addresses are the caller's promise, or live with this runner, and
        // the board's layout is that of the board's own crate.
        unsafe { kernel.launch(launch_of_replicas(&cut), Stream::borrow(stream), &args) }
    }

    fn cut_replicas(&self, rows: usize) -> Result<ReplicaGeometry> {
        self.shape.cut_replicas(rows, self.most_blocks(), self.shared_bytes)
    }
}
