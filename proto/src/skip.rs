//! Serde helper: job-file fields that were not set are not written either.

pub(crate) trait Unset {
    fn is_unset(&self) -> bool;
}

impl<T> Unset for Option<T> {
    fn is_unset(&self) -> bool {
        self.is_none()
    }
}

impl<T> Unset for Vec<T> {
    fn is_unset(&self) -> bool {
        self.is_empty()
    }
}

/// Named by the attributes that `build.rs` puts on generated fields.
pub(crate) fn unset<T: Unset>(field: &T) -> bool {
    field.is_unset()
}
