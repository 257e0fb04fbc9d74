//! One rank's calls on the CPU: count its tokens, learn its quotas, expand its top-k.

use crate::assign::Assigner;
use crate::check::check_rank;
use crate::cost::CostModel;
use crate::count::count;
use crate::error::{Error, Result};
use crate::expand::{Rows, RowsMut, check_expansion};
use crate::ids::{Id, Weight};
use crate::own::OwnCounts;
use crate::placement::Placement;

/// Makes one rank's calls; reused, it allocates nothing.
#[derive(Clone, Debug)]
pub struct Expander {
    placement: Placement,
    cost: CostModel,
    rank: usize,
    /// `[R]`
    visits: Vec<u32>,
    /// `[P]`
    routed: Vec<u32>,
    /// `[R]` of the last call.
    quotas: Vec<u32>,
    assigner: Assigner,
}

impl Expander {
    /// The calls of `rank`. `cost`: what its counts are told to cost.
    ///
    /// # Errors
    /// A rank outside the placement.
    pub fn new(placement: Placement, cost: CostModel, rank: usize) -> Result<Self> {
        let ranks = placement.ranks();
        check_rank("rank", rank as i64, ranks)?;
        let (visits, routed) = (vec![0; ranks], vec![0; placement.physical_experts()]);
        let (quotas, assigner) = (vec![0; ranks], Assigner::new());
        Ok(Self { placement, cost, rank, visits, routed, quotas, assigner })
    }

    /// One call. `learn` is given the rank's own counts and writes its quotas, `[R]`, which it asks a board for or plans
    /// itself. The result is that of [`count`], `learn` and [`Assigner::expand`], with one check of the ids.
    ///
    /// # Errors
    /// Arrays of other lengths, or an id at or above the number of physical experts: `learn` is not called then. What `learn`
    /// refuses. Quotas of it that do not add up to the tokens. Nothing is written to `out` in any of these cases.
    pub fn expand<I: Id, W: Weight, T, E: From<Error>>(
        &mut self,
        routed: Rows<I, W>,
        shared_weight: f32,
        out: RowsMut<I, W>,
        learn: impl FnOnce(&OwnCounts, &mut [u32]) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        check_expansion(routed, &out)?;
        let learned = self.learn(routed.ids, routed.top_k, true, learn)?;
        let Self { placement, rank, quotas, assigner, .. } = self;
        assigner.expand_counted(placement, *rank, routed, quotas, shared_weight, out)?;
        Ok(learned)
    }

    /// The first half of a call: count, and let `learn` write the quotas as in [`expand`](Self::expand). Without
    /// `routes_shared` the shared rows are not routed: `learn` is told of no token and no visit.
    ///
    /// # Errors
    /// Arrays of other lengths, or an id at or above the number of physical experts: `learn` is not called then. What `learn`
    /// refuses.
    pub fn learn<I: Id, T, E: From<Error>>(
        &mut self,
        ids: &[I],
        top_k: usize,
        routes_shared: bool,
        learn: impl FnOnce(&OwnCounts, &mut [u32]) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        let Self { placement, cost, rank, visits, quotas, .. } = self;
        let mut tokens = count(placement, ids, top_k, &mut self.routed, visits)?;
        if !routes_shared {
            tokens = 0;
            visits.fill(0);
        }
        let source = *rank;
        let own = OwnCounts { placement, cost, source, routed: &self.routed, visits, tokens };
        learn(&own, quotas)
    }

    /// `[R]` the quotas of the last call that was not refused; none, all 0, before the first.
    #[must_use]
    pub fn quotas(&self) -> &[u32] {
        &self.quotas
    }
}
