//! Who sends shared rows to whom: the fewest extra copies that the ranks' rooms allow.
//!
//! A source's token is free on its own rank and on a rank that it visits anyway; elsewhere it costs one
//! more copy. Own rank first, then visited ranks in proportion, then shortest augmenting paths while a
//! token is left that could still be free, then anywhere with room.

use crate::workspace::hold;

/// Shared rows that go from one source rank to one destination rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The rank whose tokens they are.
    pub source: u16,
    /// The rank that runs the shared expert for them.
    pub destination: u16,
    /// How many.
    pub rows: u32,
}

impl Transfer {
    fn new(source: usize, destination: usize, rows: u32) -> Self {
        Self { source: source as u16, destination: destination as u16, rows }
    }
}

/// Workspace of [`Transport::solve`]; reused, it allocates nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Transport {
    /// `[R]` rows of each source not yet placed.
    left: Vec<u32>,
    /// `[R]` rows that each destination still has room for.
    room: Vec<u32>,
    /// `[R]` rows of one source, while it is worked on.
    row: Vec<u32>,
    /// Destinations with room, when the step began.
    open: Vec<u32>,
    /// `[R * R]` rows by source and destination; only when a greedy pass was not enough.
    rows: Vec<u32>,
    search: Search,
}

/// Breadth-first search over sources and destinations.
#[derive(Clone, Debug, Default)]
struct Search {
    queue: Vec<u32>,
    /// `[R]` the source from which a destination was reached.
    reached_from: Vec<u32>,
    /// `[R]` the destination through which a source was reached.
    reached_through: Vec<u32>,
}

const NOBODY: u32 = u32::MAX;

impl Transport {
    /// Distribute `tokens` (`[R]`) over ranks with `room` (`[R]`, together enough), sorted by source
    /// and destination into `transfers`. `visits` is `[R * R]`.
    pub(crate) fn solve(
        &mut self,
        tokens: &[u32],
        room: impl Iterator<Item = u32>,
        visits: Option<&[u32]>,
        transfers: &mut Vec<Transfer>,
    ) {
        self.hold(tokens.len(), visits.is_some(), transfers);
        self.start(tokens, room);
        transfers.clear();
        match visits {
            None => self.send_anywhere(tokens, transfers),
            Some(visits) => {
                self.send_to_visited(tokens, visits, transfers);
                if self.left.iter().any(|&left| left > 0) {
                    self.improve(tokens, visits, transfers);
                }
            }
        }
    }

    fn hold(&mut self, ranks: usize, has_visits: bool, transfers: &mut Vec<Transfer>) {
        hold(&mut self.open, ranks);
        if has_visits {
            hold(&mut self.rows, ranks * ranks);
            self.search.hold(ranks);
            hold(transfers, ranks * ranks);
        } else {
            // Each source keeps some, and each other transfer uses up a source or a room.
            hold(transfers, 3 * ranks);
        }
    }

    /// Every source keeps what its own rank has room for.
    fn start(&mut self, tokens: &[u32], room: impl Iterator<Item = u32>) {
        self.room.clear();
        self.room.extend(room);
        self.left.clear();
        self.open.clear();
        for (rank, (&tokens, room)) in tokens.iter().zip(&mut self.room).enumerate() {
            let own = tokens.min(*room);
            *room -= own;
            self.left.push(tokens - own);
            if *room > 0 {
                self.open.push(rank as u32);
            }
        }
    }

    /// Without knowing who visits whom: the open destinations in order.
    fn send_anywhere(&mut self, tokens: &[u32], transfers: &mut Vec<Transfer>) {
        let mut open = self.open.iter().map(|&d| d as usize).peekable();
        for (source, &tokens) in tokens.iter().enumerate() {
            let own = Transfer::new(source, source, tokens - self.left[source]);
            let first = transfers.len();
            while self.left[source] > 0 {
                let Some(&destination) = open.peek() else { break };
                let rows = self.left[source].min(self.room[destination]);
                transfers.push(Transfer::new(source, destination, rows));
                self.left[source] -= rows;
                self.room[destination] -= rows;
                if self.room[destination] == 0 {
                    open.next();
                }
            }
            insert_in_order(transfers, first, own);
        }
    }

    /// Each source spreads what is left over the ranks it visits, in proportion to its visits there:
    /// visits overlap on the same tokens, so filling one destination to its visits starves the next.
    fn send_to_visited(&mut self, tokens: &[u32], visits: &[u32], transfers: &mut Vec<Transfer>) {
        let ranks = tokens.len();
        self.row.clear();
        self.row.resize(ranks, 0);
        for (source, &tokens) in tokens.iter().enumerate() {
            let own = Transfer::new(source, source, tokens - self.left[source]);
            let first = transfers.len();
            if self.left[source] > 0 {
                self.spread(source, &visits[source * ranks..][..ranks]);
                for &destination in &self.open {
                    let rows = std::mem::take(&mut self.row[destination as usize]);
                    if rows > 0 {
                        transfers.push(Transfer::new(source, destination as usize, rows));
                    }
                }
            }
            insert_in_order(transfers, first, own);
        }
    }

    fn spread(&mut self, source: usize, visits: &[u32]) {
        let usable = |room: &[u32], d: u32| u64::from(visits[d as usize].min(room[d as usize]));
        let excess = u64::from(self.left[source]);
        let total: u64 = self.open.iter().map(|&d| usable(&self.room, d)).sum();
        if total == 0 {
            return;
        }
        for index in 0..self.open.len() {
            let destination = self.open[index];
            let share = usable(&self.room, destination) * excess.min(total) / total;
            // Room shrinks only by this very share, so `usable` still has its old value here.
            self.give(source, destination, share as u32);
        }
        for index in 0..self.open.len() {
            if self.left[source] == 0 {
                break; // Else: what rounding left over.
            }
            let d = self.open[index] as usize;
            let most = (visits[d] - self.row[d]).min(self.room[d]);
            self.give(source, d as u32, most.min(self.left[source]));
        }
    }

    fn give(&mut self, source: usize, destination: u32, rows: u32) {
        self.row[destination as usize] += rows;
        self.room[destination as usize] -= rows;
        self.left[source] -= rows;
    }
}

impl Transport {
    /// A token is left that no visited rank has room for. Make room by moving others along shortest
    /// augmenting paths until none is found: then as many tokens are free as can be (maximum flow).
    /// The rest goes wherever there is room.
    fn improve(&mut self, tokens: &[u32], visits: &[u32], transfers: &mut Vec<Transfer>) {
        let ranks = tokens.len();
        self.rows.clear();
        self.rows.resize(ranks * ranks, 0);
        for t in transfers.drain(..) {
            self.rows[t.source as usize * ranks + t.destination as usize] = t.rows;
        }
        for source in 0..ranks {
            while self.left[source] > 0 {
                let Some(end) = self.search.path(source, tokens, visits, &self.rows, &self.room)
                else {
                    break;
                };
                self.augment(source, end, tokens, visits);
            }
        }
        self.place_rest(ranks);
        for source in 0..ranks {
            let row = &self.rows[source * ranks..][..ranks];
            let placed = row.iter().enumerate().filter(|&(_, &rows)| rows > 0);
            transfers.extend(placed.map(|(d, &rows)| Transfer::new(source, d, rows)));
        }
    }

    /// Move as many rows as the path from `source` to `end` carries.
    fn augment(&mut self, source: usize, end: usize, tokens: &[u32], visits: &[u32]) {
        let ranks = tokens.len();
        let mut rows = self.left[source].min(self.room[end]);
        for (from, to, instead) in self.search.steps(source, end) {
            rows = rows.min(free(from, to, tokens, visits, &self.rows));
            if let Some(instead) = instead {
                rows = rows.min(self.rows[from * ranks + instead]);
            }
        }
        for (from, to, instead) in self.search.steps(source, end) {
            self.rows[from * ranks + to] += rows;
            if let Some(instead) = instead {
                self.rows[from * ranks + instead] -= rows;
            }
        }
        self.left[source] -= rows;
        self.room[end] -= rows;
    }

    /// Tokens that cannot be free go to any room.
    fn place_rest(&mut self, ranks: usize) {
        let mut destination = 0;
        for source in 0..ranks {
            while self.left[source] > 0 && destination < ranks {
                let rows = self.left[source].min(self.room[destination]);
                self.rows[source * ranks + destination] += rows;
                self.left[source] -= rows;
                self.room[destination] -= rows;
                destination += usize::from(self.room[destination] == 0);
            }
        }
    }
}

/// How many more rows of `source` would be free on `destination`.
fn free(source: usize, destination: usize, tokens: &[u32], visits: &[u32], rows: &[u32]) -> u32 {
    let cell = source * tokens.len() + destination;
    let most = if source == destination { tokens[source] } else { visits[cell] };
    most.saturating_sub(rows[cell])
}

impl Search {
    fn hold(&mut self, ranks: usize) {
        let lists = [&mut self.queue, &mut self.reached_from, &mut self.reached_through];
        lists.into_iter().for_each(|list| hold(list, ranks));
    }

    /// The nearest destination with room that rows of `source` reach, others giving way.
    fn path(
        &mut self,
        source: usize,
        tokens: &[u32],
        visits: &[u32],
        rows: &[u32],
        room: &[u32],
    ) -> Option<usize> {
        let ranks = tokens.len();
        for reached in [&mut self.reached_from, &mut self.reached_through] {
            reached.clear();
            reached.resize(ranks, NOBODY);
        }
        self.queue.clear();
        self.queue.push(source as u32);
        let mut next = 0;
        while let Some(&from) = self.queue.get(next) {
            next += 1;
            for (to, &room) in room.iter().enumerate() {
                let seen = self.reached_from[to] != NOBODY;
                if seen || free(from as usize, to, tokens, visits, rows) == 0 {
                    continue;
                }
                self.reached_from[to] = from;
                if room > 0 {
                    return Some(to);
                }
                self.visit_sources_at(source, to, rows, ranks);
            }
        }
        None
    }

    /// Every source with rows on `destination` might move them elsewhere.
    fn visit_sources_at(&mut self, start: usize, destination: usize, rows: &[u32], ranks: usize) {
        for other in (0..ranks).filter(|&other| other != start) {
            if rows[other * ranks + destination] > 0 && self.reached_through[other] == NOBODY {
                self.reached_through[other] = destination as u32;
                self.queue.push(other as u32);
            }
        }
    }

    /// The steps of the path, last first: a source, the destination that gets its rows, and the one
    /// that gives them up (none for the source that the path starts from).
    fn steps(
        &self,
        start: usize,
        end: usize,
    ) -> impl Iterator<Item = (usize, usize, Option<usize>)> {
        let step = move |to: usize| {
            let from = self.reached_from[to] as usize;
            (from, to, (from != start).then(|| self.reached_through[from] as usize))
        };
        std::iter::successors(Some(step(end)), move |&(_, _, instead)| instead.map(step))
    }
}

/// The own rank's transfer goes among the others of its source, which start at `first`.
fn insert_in_order(transfers: &mut Vec<Transfer>, first: usize, own: Transfer) {
    if own.rows > 0 {
        let behind = transfers[first..].partition_point(|t| t.destination < own.destination);
        transfers.insert(first + behind, own);
    }
}
