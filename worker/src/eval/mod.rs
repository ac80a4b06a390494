//! Measuring a backbone: verification sets, IJB-B/C and sets compared all to all, and the numbers that the reference reports for them.
//!
//! Knows images and embeddings; it must not know networks (the caller embeds), ranks or the coordinator.

mod error;
pub mod ijb;
pub mod metrics;
pub mod mfr;
pub mod plot;
pub mod report;
pub mod verification;
pub mod verification_set;

pub use error::EvalError;
pub use verification::{Verification, evaluate};
pub use verification_set::VerificationSet;
