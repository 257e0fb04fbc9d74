//! The one error type of the crate: each variant carries the numbers that were wrong.

use std::fmt;

use crate::placement::MAX_RANKS;

/// The result of a call that can refuse its input.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an input was refused. The text says what was found and what to do.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// The number of ranks is outside `1..=MAX_RANKS`.
    Ranks {
        /// The number given.
        ranks: usize,
    },
    /// The physical experts do not divide evenly over the ranks.
    Indivisible {
        /// Number of ranks.
        ranks: usize,
        /// Number of physical experts.
        physical_experts: usize,
    },
    /// The map of physical to logical experts skips a logical expert.
    MissingLogical {
        /// The logical expert without any replica.
        logical: usize,
        /// One more than the largest logical expert named.
        logical_experts: usize,
    },
    /// An array has another length than the placement needs.
    Length {
        /// Which array.
        name: &'static str,
        /// The length given.
        found: usize,
        /// The length needed.
        expected: usize,
    },
    /// An expert id is outside the physical experts.
    ExpertId {
        /// Row of the id.
        row: usize,
        /// Column of the id.
        column: usize,
        /// The id.
        value: i64,
        /// Number of physical experts.
        physical_experts: usize,
    },
    /// A rank is outside the group.
    Rank {
        /// Which argument.
        name: &'static str,
        /// The rank given.
        rank: i64,
        /// Number of ranks.
        ranks: usize,
    },
    /// The quotas of a source do not add up to its tokens.
    Quotas {
        /// The source rank.
        source: usize,
        /// Sum of its quotas.
        quotas: u64,
        /// Its valid tokens.
        tokens: u64,
    },
    /// There are rows to place and no rank that may take them.
    NoEligibleRank {
        /// The rows.
        rows: u64,
        /// Number of ranks.
        ranks: usize,
    },
    /// A number of a cost model is not usable.
    Cost {
        /// Which number.
        name: &'static str,
        /// Its value.
        value: f64,
        /// What it must be.
        requirement: &'static str,
    },
    /// The table of a cost model is not in order.
    Table {
        /// The index of the entry at fault.
        index: usize,
        /// Its rows.
        rows: u64,
        /// Its cost.
        cost: f64,
        /// What it must be.
        requirement: &'static str,
    },
    /// Counts add up to more than the arithmetic holds.
    TooLarge {
        /// Which sum.
        name: &'static str,
        /// Its value.
        value: u64,
        /// The largest one supported.
        limit: u64,
    },
    /// The call needs a count for each expert, and a count for each rank was given.
    NeedsExpertCounts,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ranks { ranks } => {
                write!(f, "{ranks} ranks: give a number of ranks from 1 to {MAX_RANKS}")
            }
            Self::Indivisible { ranks, physical_experts } => write!(
                f,
                "{physical_experts} physical experts over {ranks} ranks leave {} over: \
                 give a positive multiple of {ranks} experts",
                physical_experts % ranks
            ),
            Self::MissingLogical { logical, logical_experts } => write!(
                f,
                "logical expert {logical} of {logical_experts} has no physical expert: \
                 number the logical experts from 0 without gaps"
            ),
            Self::Length { name, found, expected } => {
                write!(f, "{name} has {found} entries: give {expected}")
            }
            Self::ExpertId { row, column, value, physical_experts } => write!(
                f,
                "expert id {value} in row {row}, column {column}: give ids below \
                 {physical_experts}, or a negative one for none"
            ),
            Self::Rank { name, rank, ranks } => {
                write!(f, "{name} {rank}: give a rank from 0 to {}", ranks - 1)
            }
            Self::Quotas { source, quotas, tokens } => write!(
                f,
                "quotas of source {source} add up to {quotas} and it has {tokens} valid tokens: \
                 plan with the counts of these tokens"
            ),
            Self::NoEligibleRank { rows, ranks } => write!(
                f,
                "{rows} shared rows and none of the {ranks} ranks is eligible: \
                 make at least one rank eligible"
            ),
            Self::Cost { name, value, requirement } => {
                write!(f, "cost model: {name} is {value}: it must be {requirement}")
            }
            Self::Table { index, rows, cost, requirement } => write!(
                f,
                "cost table: entry {index} ({rows} rows, cost {cost}) must be {requirement}"
            ),
            Self::TooLarge { name, value, limit } => {
                write!(f, "{name} is {value}: at most {limit} is supported")
            }
            Self::NeedsExpertCounts => write!(
                f,
                "this plan needs routed counts per physical expert, and counts per rank were \
                 given: give one count per physical expert"
            ),
        }
    }
}

impl std::error::Error for Error {}
