//! What the runner refuses or the driver does, with the numbers and what to do.

use std::fmt;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A refusal. Nothing was launched.
#[derive(Debug)]
pub enum Error {
    /// A library that is not there, or too old.
    Library {
        /// Which one.
        name: &'static str,
        /// What was tried and what the loader said.
        reason: String,
    },
    /// The CUDA driver refused.
    Driver {
        /// Which function.
        call: &'static str,
        /// Its result's name.
        name: String,
        /// Its result's number.
        code: u32,
    },
    /// NVRTC refused.
    Compiler {
        /// Which function.
        call: &'static str,
        /// Its log, or its result's name.
        log: String,
    },
    /// A shape or an argument that does not fit.
    Argument(String),
    /// A shape that the core refuses, in its words.
    Core(waterfill_core::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Library { name, reason } => write!(f, "{name} cannot be used: {reason}"),
            Self::Driver { call, name, code } => write!(f, "{call} failed: {name} ({code})"),
            Self::Compiler { call, log } => write!(f, "{call} failed: {log}"),
            Self::Argument(text) => f.write_str(text),
            Self::Core(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Core(error) => Some(error),
            _ => None,
        }
    }
}

impl From<waterfill_core::Error> for Error {
    fn from(error: waterfill_core::Error) -> Self {
        Self::Core(error)
    }
}
