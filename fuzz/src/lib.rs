//! What is fuzzed: the parts of the worker and of the coordinator that read files, compiled from their own sources.
//!
//! They are taken by path, and not as crates, so that libtorch and its bindings need not be built again with the
//! fuzzer's instrumentation: a reader knows no tensor. A module that does not compile here has learnt to know one.

// Each module is here with all that it has, and the readers use a part of it.
#![allow(dead_code, unused_imports)]

pub mod readers;

#[path = "../../worker/src/data"]
pub mod data {
    //! Data sets.
    pub mod decode;
    mod error;
    mod mmap;
    pub mod pickle;
    pub mod record_index;
    pub mod recordio;
    pub use error::DataError;
}

#[path = "../../worker/src/eval"]
pub mod eval {
    //! Verification sets.
    mod error;
    mod verification_set;
    pub use error::EvalError;
    pub use verification_set::VerificationSet;
}

#[path = "../../worker/src/export"]
pub mod export {
    //! Weights.
    pub mod pytorch {
        //! PyTorch's.
        mod archive;
        mod legacy;
        pub mod state_dict;
    }
    pub mod safetensors {
        //! safetensors.
        pub mod header;
    }
}

#[path = "../../worker/src/checkpoint"]
pub mod checkpoint {
    //! Checkpoints.
    mod error;
    pub mod manifest;
    mod part;
    pub mod reshard;
    pub use error::CheckpointError;
    pub use part::PartKind;
}

#[path = "../../coordinator/src"]
pub mod coordinator {
    //! Job files.
    pub mod spec;
}
