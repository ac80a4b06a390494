//! What a panic says: libtorch's errors reach us as panics of tch.

use std::any::Any;

/// The text of a panic, if it has one.
pub fn text(panic: &(dyn Any + Send)) -> Option<&str> {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
}
