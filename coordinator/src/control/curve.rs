//! Pure: loss and speed of one job over its steps, in bounded memory. A curve is a function of the step: steps that are trained
//! again after a recovery replace those that were lost.

/// Most points of a curve. When there are as many, two become one: half of them, each of twice as many log intervals.
pub const MOST_POINTS: usize = 400;

/// A mean that can be added to.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Mean {
    sum: f64,
    count: u32,
}

impl Mean {
    fn of(value: Option<f64>) -> Self {
        let value = value.filter(|value| value.is_finite());
        Self {
            sum: value.unwrap_or(0.0),
            count: value.is_some().into(),
        }
    }

    fn with(self, other: Self) -> Self {
        Self {
            sum: self.sum + other.sum,
            count: self.count + other.count,
        }
    }

    fn value(self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / f64::from(self.count))
    }
}

/// One or more log intervals that follow each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Point {
    /// Steps finished at the end of the last one.
    pub step: u64,
    loss: Mean,
    samples_per_second: Mean,
}

impl Point {
    /// Mean loss; `None` if no interval had one.
    pub fn loss(&self) -> Option<f64> {
        self.loss.value()
    }

    /// Mean speed; `None` if no interval had one.
    pub fn samples_per_second(&self) -> Option<f64> {
        self.samples_per_second.value()
    }

    fn with(self, later: Self) -> Self {
        Self {
            step: later.step,
            loss: self.loss.with(later.loss),
            samples_per_second: self.samples_per_second.with(later.samples_per_second),
        }
    }
}

/// The curve of a job.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    points: Vec<Point>,
    /// Steps finished at the end of the first log interval.
    first_step: Option<u64>,
    /// Log intervals that make a point.
    intervals: u32,
    /// Log intervals in the newest point.
    filled: u32,
}

impl Default for Curve {
    fn default() -> Self {
        Self {
            points: Vec::new(),
            first_step: None,
            intervals: 1,
            filled: 0,
        }
    }
}

impl Curve {
    /// By step.
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// Steps finished at the end of the first log interval: what was trained before it is not in the curve.
    pub fn first_step(&self) -> Option<u64> {
        self.first_step
    }

    /// Takes in a log interval that ended after `step` steps. What is not a number is left out.
    pub fn add(&mut self, step: u64, loss: Option<f64>, samples_per_second: Option<f64>) {
        self.forget_from(step);
        if self.points.is_empty() {
            self.first_step = Some(step);
        }
        let interval = Point {
            step,
            loss: Mean::of(loss),
            samples_per_second: Mean::of(samples_per_second),
        };
        match self.points.last_mut() {
            Some(newest) if self.filled < self.intervals => {
                *newest = newest.with(interval);
                self.filled += 1;
            }
            _ => {
                if self.points.len() == MOST_POINTS {
                    self.halve();
                }
                self.points.push(interval);
                self.filled = 1;
            }
        }
    }

    /// Forgets the points that hold `step` or a later one: they were lost. A point goes as a whole.
    fn forget_from(&mut self, step: u64) {
        let kept = self.points.partition_point(|point| point.step < step);
        if kept < self.points.len() {
            self.points.truncate(kept);
            self.filled = self.intervals;
        }
    }

    fn halve(&mut self) {
        self.points = self
            .points
            .chunks(2)
            .map(|pair| pair.iter().copied().reduce(Point::with).unwrap_or(pair[0]))
            .collect();
        self.intervals = self.intervals.saturating_mul(2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn losses(curve: &Curve) -> Vec<(u64, Option<f64>)> {
        curve
            .points()
            .iter()
            .map(|point| (point.step, point.loss()))
            .collect()
    }

    #[test]
    fn a_long_curve_keeps_its_mean_its_order_and_its_bound() {
        let mut curve = Curve::default();
        let intervals = 5 * MOST_POINTS as u64 + 3;
        for step in 1..=intervals {
            curve.add(10 * step, Some(step as f64), Some(100.0));
            assert!(curve.points().len() <= MOST_POINTS);
        }
        let points = curve.points();
        assert!(points.len() > MOST_POINTS / 2, "{} are too few", points.len());
        assert!(points.windows(2).all(|pair| pair[0].step < pair[1].step));
        assert_eq!(curve.first_step(), Some(10));
        assert_eq!(points.last().map(|point| point.step), Some(10 * intervals));
        let (sum, count) = points.iter().fold((0.0, 0), |(sum, count), point| {
            (sum + point.loss.sum, count + point.loss.count)
        });
        assert_eq!(
            u64::from(count),
            intervals,
            "no interval is lost or counted twice"
        );
        assert_eq!(sum, (intervals * (intervals + 1) / 2) as f64);
        assert_eq!(points[0].samples_per_second(), Some(100.0));
    }

    #[test]
    fn steps_that_are_trained_again_replace_those_that_were_lost() {
        let mut curve = Curve::default();
        for step in 1..=6 {
            curve.add(step, Some(1.0), None);
        }
        // The next generation resumed from step 3.
        curve.add(4, Some(2.0), None);
        curve.add(5, Some(2.0), None);
        let expected = [1.0, 1.0, 1.0, 2.0, 2.0].map(Some);
        assert_eq!(losses(&curve), (1..=5).zip(expected).collect::<Vec<_>>());
        curve.add(1, Some(3.0), None);
        assert_eq!(losses(&curve), [(1, Some(3.0))]);
        assert_eq!(curve.first_step(), Some(1));
    }

    #[test]
    fn what_is_lost_of_a_merged_point_takes_all_of_it_along() {
        let mut curve = Curve::default();
        for step in 1..=MOST_POINTS as u64 + 1 {
            curve.add(step, Some(1.0), None);
        }
        // Points of two intervals now, the newest with one: (1, 2), (3, 4), .. and the last.
        assert_eq!(curve.points().len(), MOST_POINTS / 2 + 1);
        curve.add(6, Some(9.0), None);
        assert_eq!(losses(&curve), [(2, Some(1.0)), (4, Some(1.0)), (6, Some(9.0))]);
        curve.add(7, Some(11.0), None);
        assert_eq!(losses(&curve)[2], (7, Some(10.0)), "it is filled up first");
        curve.add(8, Some(11.0), None);
        assert_eq!(losses(&curve)[3], (8, Some(11.0)));
    }

    #[test]
    fn what_is_no_number_makes_no_point_of_the_line() {
        let mut curve = Curve::default();
        curve.add(1, Some(f64::NAN), Some(8.0));
        curve.add(2, None, Some(f64::INFINITY));
        assert_eq!(losses(&curve), [(1, None), (2, None)]);
        assert_eq!(curve.points()[0].samples_per_second(), Some(8.0));
        assert_eq!(curve.points()[1].samples_per_second(), None);
    }
}
