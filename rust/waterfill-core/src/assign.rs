//! One source's tokens and its quotas: which token goes where.
//!
//! Every quota is met exactly. A token is free on its own rank and on the ranks it visits, so as many
//! tokens as the quotas allow end on such a rank: greedy in the order of the tokens, then shortest
//! augmenting paths for the few that are left (a maximum matching of tokens and quotas).

use crate::error::{Error, Result};
use crate::expand::{Divisor, Id, check_ids, check_rows};
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
    /// `[R]` rows of each quota still to be met.
    left: Vec<u32>,
    /// `[words]` destinations other than the source with rows left.
    open: Vec<u64>,
    search: Search,
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
        let ranks = placement.ranks();
        let rows = check_rows(ids.len(), top_k)?;
        check_length("shared_rank", shared_rank.len(), rows)?;
        check_length("quotas", quotas.len(), ranks)?;
        if source >= ranks {
            return Err(Error::Rank { name: "source", rank: source as i64, ranks });
        }
        check_ids(placement, ids, top_k)?;
        self.look_up_visits(placement, ids, top_k);
        self.check_quotas(source, quotas)?;
        self.start(source, quotas);
        if self.greedy(source, shared_rank) {
            self.augment_pending(source, shared_rank);
            self.place_rest(shared_rank);
        }
        Ok(())
    }

    fn look_up_visits<I: Id>(&mut self, placement: &Placement, ids: &[I], top_k: usize) {
        self.words = placement.ranks().div_ceil(64);
        self.visited.clear();
        let rank_of = Divisor::new(placement.experts_per_rank());
        if self.words == 1 {
            self.visited.extend(ids.chunks_exact(top_k).map(|row| {
                row.iter().fold(0, |visited, &id| {
                    let bit = u64::from(id > I::NONE) << (rank_of.divide(id.low()) & 63);
                    visited | bit
                })
            }));
            return;
        }
        self.visited.resize(ids.len() / top_k * self.words, 0);
        let rows = ids.chunks_exact(top_k).zip(self.visited.chunks_exact_mut(self.words));
        for (row, visited) in rows {
            for &id in row.iter().filter(|&&id| id > I::NONE) {
                let rank = rank_of.divide(id.low()) as usize;
                visited[rank / 64] |= 1 << (rank % 64);
            }
        }
    }

    fn check_quotas(&self, source: usize, quotas: &[u32]) -> Result<()> {
        let is_token = |visited: &&[u64]| visited.iter().any(|&word| word != 0);
        let tokens = self.visited.chunks_exact(self.words).filter(is_token).count() as u64;
        let quotas = quotas.iter().map(|&quota| u64::from(quota)).sum();
        if quotas == tokens { Ok(()) } else { Err(Error::Quotas { source, quotas, tokens }) }
    }

    fn start(&mut self, source: usize, quotas: &[u32]) {
        self.left.clear();
        self.left.extend_from_slice(quotas);
        self.open.clear();
        self.open.resize(self.words, 0);
        for (rank, _) in
            quotas.iter().enumerate().filter(|&(rank, &quota)| quota > 0 && rank != source)
        {
            self.open[rank / 64] |= 1 << (rank % 64);
        }
    }

    /// Each token to the visited destination with the most rows left, else home; true if any is pending.
    fn greedy(&mut self, source: usize, shared_rank: &mut [i32]) -> bool {
        let mut pending = false;
        for (token, shared_rank) in shared_rank.iter_mut().enumerate() {
            let visited = &self.visited[token * self.words..][..self.words];
            let wanted = neediest(visited, &self.open, &self.left);
            *shared_rank = match wanted {
                Some(rank) => {
                    self.left[rank] -= 1;
                    self.open[rank / 64] &= !(u64::from(self.left[rank] == 0) << (rank % 64));
                    rank as i32
                }
                None if visited.iter().all(|&word| word == 0) => NO_RANK,
                None if self.left[source] > 0 => {
                    self.left[source] -= 1;
                    source as i32
                }
                None => {
                    pending = true;
                    PENDING
                }
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
                self.left[end] -= 1;
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
        self.search.mover.resize(self.left.len(), NOBODY);
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
                if self.left[rank] > 0 {
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
            while self.left[rank] == 0 {
                rank += 1;
            }
            self.left[rank] -= 1;
            *shared_rank = rank as i32;
        }
    }
}

/// The visited open destination with the most rows left; the lowest rank of equals.
fn neediest(visited: &[u64], open: &[u64], left: &[u32]) -> Option<usize> {
    let mut best = None;
    for (word, (&visited, &open)) in visited.iter().zip(open).enumerate() {
        let mut ranks = visited & open;
        while ranks != 0 {
            let rank = word * 64 + ranks.trailing_zeros() as usize;
            ranks &= ranks - 1;
            if best.is_none_or(|best: usize| left[rank] > left[best]) {
                best = Some(rank);
            }
        }
    }
    best
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
    Ok(tokens)
}
