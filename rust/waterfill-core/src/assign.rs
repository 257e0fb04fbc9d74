//! One source's tokens and its quotas: which token goes where.
//!
//! Every quota is met exactly. A token is free on its own rank and on the ranks it visits. In a few rounds,
//! every token without a rank bids for one that it visits and that has rows left, and bids are granted in
//! the order of the tokens; then the tokens that are left fill the home quota, and what is left of the
//! others. A round's bids depend on its start alone, so a GPU makes them all at once, and its kernel
//! (`waterfill-cuda`) gives the same ranks, however many threads it has.

use crate::bids::{BID_LEVELS, ROUND_STEPS, ROUNDS, STEPS};
use crate::check::{check_length, check_rank};
use crate::count::visits_word;
use crate::error::{Error, Result};
use crate::expand::{Rows, RowsMut, check_expansion, expand_checked};
use crate::ids::{Divisor, Id, Weight, check_ids, check_rows};
use crate::placement::Placement;

/// The shared rank of a row that has no valid id.
pub const NO_RANK: i32 = -1;
/// Assigns tokens to quotas; reused, it allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct Assigner {
    /// `[N, words]` the ranks that each token visits, a bit each.
    visited: Vec<u64>,
    /// Words of 64 ranks in a row of `visited`.
    words: usize,
    /// `[R]` rows of each quota still to be met.
    left: Vec<u32>,
    /// `[BID_LEVELS, words]` destinations other than the source by rows left as of the round's start.
    levels: Vec<u64>,
    /// Rows that have no rank yet, ascending.
    pending: Vec<u32>,
    /// `[N]` of [`expand`](Self::expand), which does not give it away.
    shared_rank: Vec<i32>,
}

impl Assigner {
    /// An assigner whose workspace grows to the largest batch it meets.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Give each row of `ids` (`[N, top_k]`, row-major) the rank of its shared expert, `shared_rank` (`[N]`).
    ///
    /// `quotas` (`[R]`) say how many tokens go to each rank; a row without a valid id is no token and
    /// gets [`NO_RANK`].
    ///
    /// # Errors
    /// Arrays of other lengths, `source` outside the group, an id at or above the number of physical
    /// experts, quotas that do not add up to the tokens. Nothing is written then.
    pub fn assign<I: Id>(
        &mut self,
        placement: &Placement,
        source: usize,
        ids: &[I],
        top_k: usize,
        quotas: &[u32],
        shared_rank: &mut [i32],
    ) -> Result<()> {
        let rows = check_rows(ids.len(), top_k)?;
        check_length("shared_rank", shared_rank.len(), rows)?;
        check_ids(placement, ids, top_k)?;
        self.start(placement, source, ids, top_k, quotas)?;
        self.give_ranks(source, shared_rank);
        Ok(())
    }

    /// [`assign`](Self::assign) and [`expand`](crate::expand()) in one: the ids are checked once.
    ///
    /// # Errors
    /// Those of the two. Nothing is written then.
    pub fn expand<I: Id, W: Weight>(
        &mut self,
        placement: &Placement,
        source: usize,
        routed: Rows<I, W>,
        quotas: &[u32],
        shared_weight: f32,
        out: RowsMut<I, W>,
    ) -> Result<()> {
        check_expansion(routed, &out)?;
        check_ids(placement, routed.ids, routed.top_k)?;
        self.expand_counted(placement, source, routed, quotas, shared_weight, out)
    }

    /// [`expand`](Self::expand) of arrays that fit each other, and of ids that were counted and so checked.
    pub(crate) fn expand_counted<I: Id, W: Weight>(
        &mut self,
        placement: &Placement,
        source: usize,
        routed: Rows<I, W>,
        quotas: &[u32],
        shared_weight: f32,
        out: RowsMut<I, W>,
    ) -> Result<()> {
        self.start(placement, source, routed.ids, routed.top_k, quotas)?;
        let mut shared_rank = std::mem::take(&mut self.shared_rank);
        shared_rank.resize(routed.ids.len() / routed.top_k, NO_RANK);
        self.give_ranks(source, &mut shared_rank);
        expand_checked(placement, routed, &shared_rank, W::from_f32(shared_weight), out);
        self.shared_rank = shared_rank;
        Ok(())
    }

    /// Look the visits of checked ids up, and open the quotas, if they add up.
    fn start<I: Id>(
        &mut self,
        placement: &Placement,
        source: usize,
        ids: &[I],
        top_k: usize,
        quotas: &[u32],
    ) -> Result<()> {
        let ranks = placement.ranks();
        check_length("quotas", quotas.len(), ranks)?;
        check_rank("source", source as i64, ranks)?;
        let tokens = self.look_up_visits(placement, ids, top_k);
        check_quotas(source, quotas, tokens)?;
        self.left.clear();
        self.left.extend_from_slice(quotas);
        Ok(())
    }

    fn give_ranks(&mut self, source: usize, shared_rank: &mut [i32]) {
        self.pending.clear();
        self.pending.extend(0..shared_rank.len() as u32);
        for round in 0..ROUNDS {
            if self.pending.is_empty() || !self.open_round(source) {
                break;
            }
            // A literal one makes loops over words straight code.
            match self.words {
                1 => self.bid(1, round, shared_rank),
                words => self.bid(words, round, shared_rank),
            }
        }
        self.place_rest(source, shared_rank);
    }

    /// Sort the destinations by rows left; false if none but the source has any.
    fn open_round(&mut self, source: usize) -> bool {
        let others = || self.left.iter().enumerate().filter(|&(rank, _)| rank != source);
        let most = others().map(|(_, &left)| u64::from(left)).max().unwrap_or(0);
        self.levels.clear();
        self.levels.resize(BID_LEVELS as usize * self.words, 0);
        for (rank, &left) in others().filter(|&(_, &left)| left > 0) {
            // The highest level at which `left > level * most / BID_LEVELS`.
            let level = (u64::from(left) * u64::from(BID_LEVELS) - 1) / most;
            self.levels[level as usize * self.words + rank / 64] |= 1 << (rank % 64);
        }
        for word in (0..self.levels.len() - self.words).rev() {
            self.levels[word] |= self.levels[word + self.words];
        }
        most > 0
    }

    /// One round: each pending token's bid, granted while rows are left.
    #[inline(always)]
    fn bid(&mut self, words: usize, round: u32, shared_rank: &mut [i32]) {
        let ranks = self.left.len() as u64;
        let mut kept = 0;
        for at in 0..self.pending.len() {
            let row = self.pending[at];
            let visited = &self.visited[row as usize * words..][..words];
            let [height, turn] = [0, 1].map(|i| {
                row.wrapping_mul(STEPS[i]).wrapping_add(round.wrapping_mul(ROUND_STEPS[i]))
            });
            let level = (height >> (32 - BID_LEVELS.ilog2())) as usize;
            let first = ((u64::from(turn) * ranks) >> 32) as usize;
            let open = &self.levels[..words];
            let high = &self.levels[level * words..][..words];
            let rank = if let ([visited], [high], [open]) = (visited, high, open) {
                first_of(either(visited & high, visited & open), first)
            } else {
                first_common(visited, high, first).or_else(|| first_common(visited, open, first))
            };
            // Without a branch: who is left over is as good as random.
            let granted = rank.is_some_and(|rank| self.left[rank] > 0);
            let rank = rank.unwrap_or(0);
            self.left[rank] -= u32::from(granted);
            shared_rank[row as usize] = rank as i32;
            self.pending[kept] = row;
            kept += usize::from(!granted);
        }
        self.pending.truncate(kept);
    }

    /// Those without a rank: at home while rows are left there, then wherever some are, which costs a copy.
    fn place_rest(&mut self, source: usize, shared_rank: &mut [i32]) {
        let mut rank = source;
        let mut next = 0;
        for &row in &self.pending {
            let visited = &self.visited[row as usize * self.words..][..self.words];
            shared_rank[row as usize] = if visited.iter().all(|&word| word == 0) {
                NO_RANK
            } else {
                while self.left[rank] == 0 {
                    rank = next;
                    next += 1;
                }
                self.left[rank] -= 1;
                rank as i32
            };
        }
    }

    /// The ranks that each token visits; gives the number of tokens.
    fn look_up_visits<I: Id>(&mut self, placement: &Placement, ids: &[I], top_k: usize) -> u64 {
        self.words = placement.ranks().div_ceil(64);
        self.visited.clear();
        if self.words == 1 {
            // A literal number of columns unrolls the rows; these are the models' usual ones.
            return match top_k {
                6 => self.look_up_words(placement, ids, 6),
                8 => self.look_up_words(placement, ids, 8),
                _ => self.look_up_words(placement, ids, top_k),
            };
        }
        self.visited.resize(ids.len() / top_k * self.words, 0);
        let rank_of = Divisor::new(placement.experts_per_rank());
        let rows = ids.chunks_exact(top_k).zip(self.visited.chunks_exact_mut(self.words));
        let mut tokens = 0;
        for (row, visited) in rows {
            for &id in row.iter().filter(|&&id| id > I::NONE) {
                visited[rank_of.divide(id.low()) as usize / 64] |= placement.rank_bit(id.low());
            }
            tokens += u64::from(visited.iter().any(|&word| word != 0));
        }
        tokens
    }

    #[inline(always)]
    fn look_up_words<I: Id>(&mut self, placement: &Placement, ids: &[I], top_k: usize) -> u64 {
        let mut tokens = 0;
        self.visited.extend(ids.chunks_exact(top_k).map(|row| {
            let visited = visits_word(placement, row);
            tokens += u64::from(visited != 0);
            visited
        }));
        tokens
    }
}

fn check_quotas(source: usize, quotas: &[u32], tokens: u64) -> Result<()> {
    let quotas = quotas.iter().map(|&quota| u64::from(quota)).sum();
    if quotas == tokens { Ok(()) } else { Err(Error::Quotas { source, quotas, tokens }) }
}

#[inline(always)]
fn either(preferred: u64, other: u64) -> u64 {
    if preferred != 0 { preferred } else { other }
}

/// The first rank of a word, from `first` on and around.
#[inline(always)]
fn first_of(ranks: u64, first: usize) -> Option<usize> {
    let after = ranks.rotate_right(first as u32).trailing_zeros() as usize;
    (ranks != 0).then_some((after + first) % 64)
}

/// The first rank that is in both, from `first` on and around.
fn first_common(visited: &[u64], ranks: &[u64], first: usize) -> Option<usize> {
    let words = visited.len();
    // The first word twice: its ranks from `first` on come first, the others last.
    (0..=words).find_map(|step| {
        let word = (first / 64 + step) % words;
        let from = match step {
            0 => u64::MAX << (first % 64),
            _ if step == words => !(u64::MAX << (first % 64)),
            _ => u64::MAX,
        };
        let common = visited[word] & ranks[word] & from;
        (common != 0).then(|| word * 64 + common.trailing_zeros() as usize)
    })
}
