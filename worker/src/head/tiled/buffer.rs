//! Memory that is taken once and kept: words on cache-line boundaries, because a vector load across two lines costs
//! twice. Grows, never shrinks.

use bytemuck::{Pod, Zeroable};

/// A cache line.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u32; 16]);

/// Words or f32 on cache-line boundaries, zero when new.
#[derive(Default)]
pub struct Buffer {
    lines: Vec<Line>,
}

impl Buffer {
    /// At least `words` words.
    pub fn reserve(&mut self, words: usize) {
        let lines = words.div_ceil(16);
        if self.lines.len() < lines {
            self.lines.resize(lines, Line::zeroed());
        }
    }

    /// As words.
    pub fn words(&self) -> &[u32] {
        bytemuck::cast_slice(&self.lines)
    }

    /// As words, to write.
    pub fn words_mut(&mut self) -> &mut [u32] {
        bytemuck::cast_slice_mut(&mut self.lines)
    }

    /// As numbers.
    pub fn floats(&self) -> &[f32] {
        bytemuck::cast_slice(&self.lines)
    }

    /// As numbers, to write.
    pub fn floats_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.lines)
    }
}
