//! Decoded images, kept by the rank that read them. Nothing is ever thrown out for something newer: every image comes once an epoch, so
//! that no choice of what to keep would be asked for more often than the images that came first.

use super::Pixels;
use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

/// What an image takes: its 37,632 bytes of pixels, with its label, in the allocator's next size (40 KiB), and its place in the table.
const IMAGE_BYTES: u64 = (40 << 10) + 64;

/// Images by their index in the data set, as many as fit into an amount of memory. Threads share it.
#[derive(Debug)]
pub struct ImageCache {
    most: u64,
    kept: RwLock<HashMap<u64, Box<Kept>>>,
}

#[derive(Debug)]
struct Kept {
    label: u32,
    pixels: Pixels,
}

impl ImageCache {
    /// Empty; grows to so many bytes at most.
    pub fn new(bytes: u64) -> Self {
        Self {
            most: bytes / IMAGE_BYTES,
            kept: RwLock::default(),
        }
    }

    /// The label of an image that is here, and its pixels in `pixels`.
    pub fn get(&self, index: u64, pixels: &mut Pixels) -> Option<u32> {
        let kept = self.kept.read().unwrap_or_else(PoisonError::into_inner);
        let kept = kept.get(&index)?;
        *pixels = kept.pixels;
        Some(kept.label)
    }

    /// Keeps an image, if there is room.
    pub fn keep(&self, index: u64, label: u32, pixels: &Pixels) {
        if self.len() >= self.most {
            return;
        }
        let new = Box::new(Kept {
            label,
            pixels: *pixels,
        });
        let mut kept = self.kept.write().unwrap_or_else(PoisonError::into_inner);
        // Other threads may have filled it meanwhile.
        if (kept.len() as u64) < self.most {
            kept.insert(index, new);
        }
    }

    /// Images that are here.
    fn len(&self) -> u64 {
        self.kept.read().unwrap_or_else(PoisonError::into_inner).len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::{super::decode::PIXEL_BYTES, *};

    #[test]
    fn it_gives_what_it_was_given_and_grows_no_further_than_it_may() {
        let cache = ImageCache::new(2 * IMAGE_BYTES + IMAGE_BYTES / 2);
        let image = |byte| [byte; PIXEL_BYTES];
        let mut pixels = image(0);
        assert_eq!(cache.get(7, &mut pixels), None);
        for index in [7, 7, 300, 8] {
            cache.keep(index, index as u32 + 1, &image(index as u8));
        }
        for (index, found) in [(7, Some(8)), (300, Some(301)), (8, None)] {
            assert_eq!(cache.get(index, &mut pixels), found);
            assert!(found.is_none() || pixels == image(index as u8), "{index}");
        }
        let none = ImageCache::new(IMAGE_BYTES - 1);
        none.keep(0, 0, &image(1));
        assert_eq!(none.len(), 0);
    }

    #[test]
    fn threads_that_fill_it_at_once_stay_below_its_limit() {
        let cache = ImageCache::new(10 * IMAGE_BYTES);
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let cache = &cache;
                scope.spawn(move || {
                    for index in 0..20 {
                        cache.keep(thread * 100 + index, 1, &[3; PIXEL_BYTES]);
                    }
                });
            }
        });
        assert_eq!(cache.len(), 10);
    }
}
