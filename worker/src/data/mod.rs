//! data.
pub mod pickle;
