//! The constants by which tokens bid for ranks, in rounds ([`Assigner`](crate::Assigner)).
//!
//! Whoever gives the same ranks in another place, as the kernel does, takes them from here.

/// Rounds of bids.
pub const ROUNDS: u32 = 2;
/// Levels of rows left in a round: level `l` is `l / BID_LEVELS` of the most rows that any destination has left.
pub const BID_LEVELS: u32 = 32;
/// Steps of the two sequences that spread the rows of a batch over levels and over ranks: 2^32 over the
/// plastic number and over its square, so that any few rows in a row are spread evenly over both.
pub const STEPS: [u32; 2] = [0xc13f_a9a9, 0x91e1_0da5];
/// What each round adds to the two.
pub const ROUND_STEPS: [u32; 2] = [0x9e37_79b9, 0x85eb_ca77];
