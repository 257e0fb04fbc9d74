//! One source's tokens and its quotas: which token goes where.
//!
//! Every quota is met exactly. A token is free on its own rank and on the ranks it visits, so as many
//! tokens as the quotas allow end on such a rank: greedy in the order of the tokens, then shortest
//! augmenting paths for the few that are left (a maximum matching of tokens and quotas).

use crate::error::{Error, Result};
use crate::expand::{
    Divisor, Id, Rows, RowsMut, Weight, check_expansion, check_ids, check_rows, expand_checked,
};
use crate::placement::Placement;
use crate::problem::check_length;

/// The shared rank of a row that has no valid id.
pub const NO_RANK: i32 = -1;
/// While assigning: a token that has no rank yet.
const PENDING: i32 = -2;
const NOBODY: u32 = u32::MAX;

/// Assigns tokens to quotas; reused, it allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct Assigner {
    /// `[N, words]` the ranks that each token visits, a bit each.
    visited: Vec<u64>,
    /// Words of 64 ranks in a row of `visited`.
    words: usize,
    quotas: Quotas,
    search: Search,
    /// `[N]` of [`expand`](Self::expand), which does not give it away.
    shared_rank: Vec<i32>,
}

/// What is left of the quotas while tokens are assigned.
#[derive(Clone, Debug, Default)]
struct Quotas {
    /// `[R]` rows of each quota still to be met.
    left: Vec<u32>,
    /// `[words]` destinations other than the source with rows left.
    open: Vec<u64>,
    /// `[words]` those of them with the most rows left.
    urgent: Vec<u64>,
    /// A destination with at most so many rows left is not urgent any more.
    urgent_above: u32,
}

/// Breadth-first search over ranks: which token could move on from which rank to which.
#[derive(Clone, Debug, Default)]
struct Search {
    queue: Vec<u32>,
    /// `[R]` the token that would move to a rank.
    mover: Vec<u32>,
    /// `[words]` ranks from which nothing can be reached any more.
    dead: Vec<u64>,
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
        self.start(placement, source, routed.ids, routed.top_k, quotas)?;
        let mut shared_rank = std::mem::take(&mut self.shared_rank);
        shared_rank.resize(routed.ids.len() / routed.top_k, NO_RANK);
        self.give_ranks(source, &mut shared_rank);
        expand_checked(placement, routed, &shared_rank, W::from_f32(shared_weight), out);
        self.shared_rank = shared_rank;
        Ok(())
    }

    /// Check everything, look the visits up, and open the quotas.
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
        if source >= ranks {
            return Err(Error::Rank { name: "source", rank: source as i64, ranks });
        }
        check_ids(placement, ids, top_k)?;
        let tokens = self.look_up_visits(placement, ids, top_k);
        check_quotas(source, quotas, tokens)?;
        self.quotas.start(source, quotas, self.words);
        Ok(())
    }

    fn give_ranks(&mut self, source: usize, shared_rank: &mut [i32]) {
        if self.greedy(source, shared_rank) {
            self.augment_pending(source, shared_rank);
            self.place_rest(shared_rank);
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

    /// Each token to a visited destination that is among those with the most rows left, else home; true
    /// if any is pending.
    fn greedy(&mut self, source: usize, shared_rank: &mut [i32]) -> bool {
        // A literal one makes loops over words straight code.
        match self.words {
            1 => self.greedy_words(1, source, shared_rank),
            words => self.greedy_words(words, source, shared_rank),
        }
    }

    #[inline(always)]
    fn greedy_words(&mut self, words: usize, source: usize, shared_rank: &mut [i32]) -> bool {
        let mut pending = false;
        for (visited, shared_rank) in self.visited.chunks_exact(words).zip(shared_rank) {
            *shared_rank = if let Some(rank) = self.quotas.wanted(visited) {
                self.quotas.take(rank);
                rank as i32
            } else if visited.iter().all(|&word| word == 0) {
                NO_RANK
            } else if self.quotas.left[source] > 0 {
                self.quotas.left[source] -= 1;
                source as i32
            } else {
                pending = true;
                PENDING
            };
        }
        pending
    }

    /// Move tokens on along shortest paths, so that a pending one gets a rank where it is free.
    fn augment_pending(&mut self, source: usize, shared_rank: &mut [i32]) {
        self.search.dead.clear();
        self.search.dead.resize(self.words, 0);
        for token in 0..shared_rank.len() {
            if shared_rank[token] != PENDING {
                continue;
            }
            if let Some(end) = self.find_path(source, token, shared_rank) {
                self.quotas.left[end] -= 1;
                let mut rank = end;
                loop {
                    let mover = self.search.mover[rank] as usize;
                    let before = std::mem::replace(&mut shared_rank[mover], rank as i32);
                    if mover == token {
                        break;
                    }
                    rank = before as usize;
                }
            } else {
                // Whatever this search reached leads nowhere for the others too.
                for &rank in &self.search.queue {
                    self.search.dead[rank as usize / 64] |= 1 << (rank % 64);
                }
            }
        }
    }

    /// The nearest rank with rows left, reached from a pending token over tokens that move on.
    fn find_path(&mut self, source: usize, start: usize, shared_rank: &[i32]) -> Option<usize> {
        self.search.queue.clear();
        self.search.mover.clear();
        self.search.mover.resize(self.quotas.left.len(), NOBODY);
        if let Some(end) = self.reach(source, start) {
            return Some(end);
        }
        let mut next = 0;
        while let Some(&rank) = self.search.queue.get(next) {
            next += 1;
            for (token, _) in shared_rank.iter().enumerate().filter(|&(_, &at)| at == rank as i32) {
                if let Some(end) = self.reach(source, token) {
                    return Some(end);
                }
            }
        }
        None
    }

    /// Queue every rank on which `token` is free and that was not reached before; the first with rows left ends it.
    fn reach(&mut self, source: usize, token: usize) -> Option<usize> {
        for word in 0..self.words {
            let home = u64::from(source / 64 == word) << (source % 64);
            let mut ranks =
                (self.visited[token * self.words + word] | home) & !self.search.dead[word];
            while ranks != 0 {
                let rank = word * 64 + ranks.trailing_zeros() as usize;
                ranks &= ranks - 1;
                if self.search.mover[rank] != NOBODY {
                    continue;
                }
                self.search.mover[rank] = token as u32;
                self.search.queue.push(rank as u32);
                if self.quotas.left[rank] > 0 {
                    return Some(rank);
                }
            }
        }
        None
    }

    /// Tokens that are free nowhere any more cost a copy wherever they go.
    fn place_rest(&mut self, shared_rank: &mut [i32]) {
        let mut rank = 0;
        for shared_rank in shared_rank.iter_mut().filter(|rank| **rank == PENDING) {
            while self.quotas.left[rank] == 0 {
                rank += 1;
            }
            self.quotas.left[rank] -= 1;
            *shared_rank = rank as i32;
        }
    }
}

impl Quotas {
    fn start(&mut self, source: usize, quotas: &[u32], words: usize) {
        self.left.clear();
        self.left.extend_from_slice(quotas);
        self.open.clear();
        self.open.resize(words, 0);
        self.urgent.clear();
        self.urgent.resize(words, 0);
        for (rank, &quota) in quotas.iter().enumerate() {
            let open = quota > 0 && rank != source;
            self.open[rank / 64] |= u64::from(open) << (rank % 64);
        }
    }

    /// The visited open destination that takes a token: the first urgent one, else the first.
    #[inline(always)]
    fn wanted(&mut self, visited: &[u64]) -> Option<usize> {
        if let Some(rank) = first_common(visited, &self.urgent[..visited.len()]) {
            return Some(rank);
        }
        let rank = first_common(visited, &self.open[..visited.len()])?;
        if self.urgent.iter().any(|&word| word != 0) {
            return Some(rank);
        }
        self.renew_urgent();
        first_common(visited, &self.urgent).or(Some(rank))
    }

    #[inline(always)]
    fn take(&mut self, rank: usize) {
        self.left[rank] -= 1;
        let bit = 1 << (rank % 64);
        if self.left[rank] <= self.urgent_above {
            self.urgent[rank / 64] &= !bit;
        }
        if self.left[rank] == 0 {
            self.open[rank / 64] &= !bit;
        }
    }

    /// Urgent are the open destinations whose rows left are within an eighth of the most. The eighth
    /// lets the quotas shrink together without a search for the largest at every token.
    #[cold]
    fn renew_urgent(&mut self) {
        let open = |rank: usize| self.open[rank / 64] >> (rank % 64) & 1 == 1;
        let most = (0..self.left.len()).filter(|&r| open(r)).map(|r| self.left[r]).max();
        let Some(most) = most else { return };
        self.urgent_above = most - most.div_ceil(8);
        for rank in (0..self.left.len()).filter(|&rank| open(rank)) {
            let urgent = self.left[rank] > self.urgent_above;
            self.urgent[rank / 64] |= u64::from(urgent) << (rank % 64);
        }
    }
}

fn check_quotas(source: usize, quotas: &[u32], tokens: u64) -> Result<()> {
    let quotas = quotas.iter().map(|&quota| u64::from(quota)).sum();
    if quotas == tokens { Ok(()) } else { Err(Error::Quotas { source, quotas, tokens }) }
}

/// The lowest rank that is in both.
#[inline(always)]
fn first_common(visited: &[u64], ranks: &[u64]) -> Option<usize> {
    visited.iter().zip(ranks).enumerate().find_map(|(word, (visited, ranks))| {
        let common = visited & ranks;
        (common != 0).then(|| word * 64 + common.trailing_zeros() as usize)
    })
}

/// The ranks that a token visits, where all ranks fit one word.
#[inline(always)]
fn visits_word<I: Id>(placement: &Placement, row: &[I]) -> u64 {
    row.iter().fold(0, |visited, &id| visited | placement.rank_bit(id.low()))
}

/// Count one source's routed rows: `counts` `[P]` per physical expert and `visits` `[R]`, how many of
/// its tokens have an expert on each rank. Gives the number of tokens: rows with at least one valid id.
///
/// # Errors
/// Arrays of other lengths, or an id at or above the number of physical experts. Nothing is written then.
pub fn count<I: Id>(
    placement: &Placement,
    ids: &[I],
    top_k: usize,
    counts: &mut [u32],
    visits: &mut [u32],
) -> Result<u32> {
    check_rows(ids.len(), top_k)?;
    check_length("counts", counts.len(), placement.physical_experts())?;
    check_length("visits", visits.len(), placement.ranks())?;
    check_ids(placement, ids, top_k)?;
    counts.fill(0);
    visits.fill(0);
    let one_word = placement.ranks() <= 64;
    Ok(match top_k {
        6 if one_word => count_rows(placement, ids, 6, counts, visits),
        8 if one_word => count_rows(placement, ids, 8, counts, visits),
        _ if one_word => count_rows(placement, ids, top_k, counts, visits),
        _ => count_wide_rows(placement, ids, top_k, counts, visits),
    })
}

#[inline(always)]
fn count_rows<I: Id>(
    placement: &Placement,
    ids: &[I],
    top_k: usize,
    counts: &mut [u32],
    visits: &mut [u32],
) -> u32 {
    let mut tokens = 0;
    // Eight ranks' counters share a word, a byte each, and are emptied before any could overflow.
    let mut lanes = [0u64; 8];
    let words = visits.len().div_ceil(8);
    for rows in ids.chunks(255 * top_k) {
        for row in rows.chunks_exact(top_k) {
            for id in row {
                if let Some(count) = counts.get_mut(id.low() as usize) {
                    *count += 1;
                }
            }
            let visited = visits_word(placement, row);
            tokens += u32::from(visited != 0);
            for (word, lane) in lanes[..words].iter_mut().enumerate() {
                *lane += BYTE_OF_BIT[(visited >> (8 * word) & 255) as usize];
            }
        }
        for (rank, visits) in visits.iter_mut().enumerate() {
            *visits += (lanes[rank / 8] >> (8 * (rank % 8)) & 255) as u32;
        }
        lanes = [0; 8];
    }
    tokens
}

/// Byte i of an entry is bit i of its index.
static BYTE_OF_BIT: [u64; 256] = {
    let mut table = [0; 256];
    let mut bits = 0;
    while bits < 256 {
        let mut bit = 0;
        while bit < 8 {
            table[bits] |= (bits as u64 >> bit & 1) << (8 * bit);
            bit += 1;
        }
        bits += 1;
    }
    table
};

fn count_wide_rows<I: Id>(
    placement: &Placement,
    ids: &[I],
    top_k: usize,
    counts: &mut [u32],
    visits: &mut [u32],
) -> u32 {
    let mut tokens = 0;
    for row in ids.chunks_exact(top_k) {
        for (column, &id) in row.iter().enumerate().filter(|&(_, &id)| id > I::NONE) {
            let id = id.low() as usize;
            counts[id] += 1;
            let rank = placement.rank_of(id);
            let before = row[..column].iter().filter(|&&id| id > I::NONE);
            let seen = before.map(|id| placement.rank_of(id.low() as usize)).any(|r| r == rank);
            visits[rank] += u32::from(!seen);
        }
        tokens += u32::from(row.iter().any(|&id| id > I::NONE));
    }
    tokens
}
