//! Messages of the wire as others read them: JSON for programs, and the words that stand in it. Pure. Shared by the command line
//! and the status page, so that both say the same.

pub mod json;
pub mod words;
