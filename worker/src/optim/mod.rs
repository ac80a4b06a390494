//! Update rules, clipping and the learning rate: values in, values out. Knows no model, no head, no rank, no file.

pub mod schedule;
