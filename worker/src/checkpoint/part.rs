//! The parts of a checkpoint and the names of their files.

use arcface_proto::types::ClassRange;

/// What a part holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartKind {
    /// Everything that all ranks share: backbone, its optimizer, loss scale.
    Backbone,
    /// Rows of these classes: weights and optimizer state of the head. Each tensor has one row a class, or no
    /// dimension at all (shape `[]`): such a value must be the same in every part.
    Head(ClassRange),
}

impl PartKind {
    /// Name of the part's file.
    pub fn file(self) -> String {
        match self {
            Self::Backbone => "backbone.safetensors".into(),
            Self::Head(classes) => format!("head-{}-{}.safetensors", classes.lo, classes.hi),
        }
    }

    /// Classes held; none for the backbone.
    pub fn classes(self) -> ClassRange {
        match self {
            Self::Backbone => ClassRange { lo: 0, hi: 0 },
            Self::Head(classes) => classes,
        }
    }
}
