//! SGD steps that a row of weights has missed, made up for at once. Pure; knows no tensor and no sampling.
//!
//! The reference's dense SGD decays and moves every row at every step, also those that were not sampled. For a row
//! without gradient a step is a linear map, the same for all rows:
//!
//! `v' = mu*v + wd*w`, `w' = w - lr*v'`, so `(w', v') = [[1 - lr*wd, -lr*mu], [wd, mu]] (w, v)`.
//!
//! A row that was last touched before step s is brought up to date by the product of the maps since s, formed in f64.
//! That equals the dense steps to rounding, at the cost of the rows that are touched.

use std::collections::VecDeque;

/// A linear map of (weight, momentum), the same for every element of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Map {
    /// New weight by old weight.
    pub w_by_w: f64,
    /// New weight by old momentum.
    pub w_by_v: f64,
    /// New momentum by old weight.
    pub v_by_w: f64,
    /// New momentum by old momentum.
    pub v_by_v: f64,
}

impl Map {
    /// One SGD step without gradient.
    pub fn step(lr: f64, momentum: f64, weight_decay: f64) -> Self {
        Self {
            w_by_w: 1.0 - lr * weight_decay,
            w_by_v: -lr * momentum,
            v_by_w: weight_decay,
            v_by_v: momentum,
        }
    }

    /// First `self`, then `next`.
    pub fn then(&self, next: &Self) -> Self {
        Self {
            w_by_w: next.w_by_w * self.w_by_w + next.w_by_v * self.v_by_w,
            w_by_v: next.w_by_w * self.w_by_v + next.w_by_v * self.v_by_v,
            v_by_w: next.v_by_w * self.w_by_w + next.v_by_v * self.v_by_w,
            v_by_v: next.v_by_w * self.w_by_v + next.v_by_v * self.v_by_v,
        }
    }
}

/// The maps of the latest steps. Steps are counted from 0 since the history began.
#[derive(Clone, Debug)]
pub struct History {
    momentum: f64,
    weight_decay: f64,
    /// Steps taken.
    now: u32,
    /// Element i is the product of the maps of steps `now - len + i .. now`.
    products: VecDeque<Map>,
    capacity: usize,
}

/// Fewest steps remembered.
const FEWEST: usize = 64;
/// Most steps remembered: every step updates them all, which must stay below the cost of a few hundred rows.
const MOST: usize = 8192;

impl History {
    /// A history for rows that are touched with probability `rate` a step. It remembers 8 / rate steps: the share of
    /// rows that waits longer, e^-8, costs nothing to bring up to date apart.
    pub fn new(momentum: f64, weight_decay: f64, rate: f64) -> Self {
        let steps = (8.0 / rate).ceil();
        Self {
            momentum,
            weight_decay,
            now: 0,
            products: VecDeque::new(),
            // A rate of 0 or NaN becomes a number of the range, as any other.
            capacity: (steps as usize).clamp(FEWEST, MOST),
        }
    }

    /// Steps taken: what a row touched now notes.
    pub fn now(&self) -> u32 {
        self.now
    }

    /// What a row has missed that was last touched when `now` was `since`; `None` if nothing.
    ///
    /// # Panics
    /// If the steps since are no longer remembered: [`Self::overdue`] says in time which rows must not wait.
    pub fn missed(&self, since: u32) -> Option<&Map> {
        let back = (self.now - since) as usize;
        if back == 0 {
            return None;
        }
        let index = self.products.len().checked_sub(back);
        Some(&self.products[index.expect("rows are brought up to date before their steps are forgotten")])
    }

    /// The products of the maps of the latest steps: element i is that of all steps from the i-th remembered one on.
    pub fn remembered(&self) -> impl Iterator<Item = &Map> {
        self.products.iter()
    }

    /// Takes a step with this learning rate. Rows touched in it are noted with the `now` after it.
    pub fn advance(&mut self, lr: f64) {
        let step = Map::step(lr, self.momentum, self.weight_decay);
        self.products
            .iter_mut()
            .for_each(|product| *product = product.then(&step));
        self.products.push_back(step);
        self.now += 1;
    }

    /// When the memory is full: rows noted before this must be brought up to date now, and then
    /// [`forgotten`](Self::forget).
    pub fn overdue(&self) -> Option<u32> {
        (self.products.len() >= 2 * self.capacity).then(|| self.now - self.capacity as u32)
    }

    /// Forgets the steps before `since`.
    pub fn forget(&mut self, since: u32) {
        let keep = (self.now - since) as usize;
        while self.products.len() > keep {
            self.products.pop_front();
        }
    }

    /// Begins anew: all rows are up to date.
    pub fn restart(&mut self) {
        self.now = 0;
        self.products.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Rows touched at random against step-by-step SGD in f64, with a rate that changes and a short memory.
        #[test]
        fn what_was_missed_is_made_up_for(
            touches in prop::collection::vec(0.0f64..1.0, 1..400), rate in 0.01f64..1.0, momentum in 0.0f64..0.99
        ) {
            let mut history = History::new(momentum, 5e-4, rate);
            let (mut dense, mut lazy, mut noted) = ((0.7f64, -0.2f64), (0.7f64, -0.2f64), 0u32);
            for (step, touch) in touches.iter().enumerate() {
                let (lr, gradient) = (0.1 / (1.0 + step as f64 / 50.0), 0.3);
                let gradient = if *touch < rate { gradient } else { 0.0 };
                dense.1 = momentum * dense.1 + gradient + 5e-4 * dense.0;
                dense.0 -= lr * dense.1;
                if *touch < rate {
                    if let Some(map) = history.missed(noted) {
                        lazy = apply(map, lazy);
                    }
                    lazy.1 = momentum * lazy.1 + gradient + 5e-4 * lazy.0;
                    lazy.0 -= lr * lazy.1;
                    noted = history.now() + 1;
                }
                history.advance(lr);
                if let Some(since) = history.overdue() {
                    if noted < since {
                        lazy = history.missed(noted).map_or(lazy, |map| apply(map, lazy));
                        noted = history.now();
                    }
                    history.forget(since);
                }
            }
            let lazy = history.missed(noted).map_or(lazy, |map| apply(map, lazy));
            prop_assert!((lazy.0 - dense.0).abs() < 1e-12 && (lazy.1 - dense.1).abs() < 1e-12, "{lazy:?} {dense:?}");
        }
    }

    fn apply(map: &Map, (w, v): (f64, f64)) -> (f64, f64) {
        (map.w_by_w * w + map.w_by_v * v, map.v_by_w * w + map.v_by_v * v)
    }

    #[test]
    fn memory_is_bounded() {
        let mut history = History::new(0.9, 0.0, 1e-9);
        for _ in 0..3 * MOST {
            history.advance(0.1);
            if let Some(since) = history.overdue() {
                history.forget(since);
            }
        }
        assert!(history.products.len() < 2 * MOST);
        assert_eq!(history.missed(history.now()), None);
    }
}
