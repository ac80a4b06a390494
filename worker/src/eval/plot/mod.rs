//! Charts of curves: what is drawn where, in pixels. [`svg`] and [`raster`] put the same marks on paper; neither knows
//! what a chart means.

mod font;
pub mod raster;
pub mod svg;

/// Size of a chart, in pixels.
pub const WIDTH: f64 = 800.0;
/// Height of a chart, in pixels.
pub const HEIGHT: f64 = 600.0;
/// Edges of the area of the curves: left, right, top, bottom.
const AREA: [f64; 4] = [90.0, 770.0, 60.0, 520.0];

const BLACK: Colour = [0x22, 0x22, 0x22];
const GREY: Colour = [0xdd, 0xdd, 0xdd];
/// Colours of the curves, told apart in print and by most colour-blind readers (Okabe and Ito).
const CURVES: [Colour; 4] = [
    [0x00, 0x72, 0xb2],
    [0xd5, 0x5e, 0x00],
    [0x00, 0x9e, 0x73],
    [0xcc, 0x79, 0xa7],
];

/// Red, green, blue.
type Colour = [u8; 3];

/// How values become places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Equal differences are equal distances.
    Linear,
    /// Equal ratios are equal distances; values must be above 0.
    Log,
}

/// An axis.
#[derive(Clone, Debug)]
pub struct Axis {
    /// What it measures.
    pub label: String,
    /// How values become places.
    pub scale: Scale,
    /// Lowest value shown.
    pub low: f64,
    /// Highest value shown.
    pub high: f64,
    /// Marked values.
    pub ticks: Vec<f64>,
}

impl Axis {
    /// From 10^`low` to 10^`high`, a mark at each power.
    pub fn decades(label: &str, low: i32, high: i32) -> Self {
        Self {
            label: label.into(),
            scale: Scale::Log,
            low: 10f64.powi(low),
            high: 10f64.powi(high),
            ticks: (low..=high).map(|power| 10f64.powi(power)).collect(),
        }
    }

    /// From `low` to `high`, with ten steps.
    pub fn linear(label: &str, low: f64, high: f64) -> Self {
        Self {
            label: label.into(),
            scale: Scale::Linear,
            low,
            high,
            ticks: (0..=10)
                .map(|k| low + (high - low) * f64::from(k) / 10.0)
                .collect(),
        }
    }

    /// Where a value lies between the ends, in [0, 1].
    fn place(&self, value: f64) -> f64 {
        let place = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        };
        place.clamp(0.0, 1.0)
    }

    fn text(&self, tick: f64) -> String {
        match self.scale {
            Scale::Linear => format!("{tick:.2}"),
            Scale::Log => format!("{tick:e}"),
        }
    }
}

/// A curve.
#[derive(Clone, Debug)]
pub struct Curve {
    /// What it shows.
    pub name: String,
    /// Its points.
    pub points: Vec<(f64, f64)>,
    /// Vertical bars: x, from, to.
    pub bars: Vec<(f64, f64, f64)>,
}

/// A chart.
#[derive(Clone, Debug)]
pub struct Chart {
    /// Text above.
    pub title: String,
    /// Horizontal axis.
    pub x: Axis,
    /// Vertical axis.
    pub y: Axis,
    /// What is shown, at most as many as there are colours; more take their colours in turn.
    pub curves: Vec<Curve>,
}

/// How a text lies at its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Anchor {
    Start,
    Middle,
    End,
    /// Centred, read from below.
    Upward,
}

/// Something to draw.
#[derive(Clone, Debug, PartialEq)]
enum Mark {
    Line {
        points: Vec<(f64, f64)>,
        colour: Colour,
        width: f64,
    },
    Text {
        at: (f64, f64),
        text: String,
        anchor: Anchor,
    },
}

impl Chart {
    /// Everything to draw, in order.
    fn marks(&self) -> Vec<Mark> {
        let [left, right, top, bottom] = AREA;
        let x = |value: f64| left + (right - left) * self.x.place(value);
        let y = |value: f64| bottom - (bottom - top) * self.y.place(value);
        let line = |points: Vec<(f64, f64)>, colour, width| Mark::Line {
            points,
            colour,
            width,
        };
        let text = |at, text: &str, anchor| Mark::Text {
            at,
            text: text.to_owned(),
            anchor,
        };
        let mut marks = Vec::new();
        for &tick in &self.x.ticks {
            marks.push(line(vec![(x(tick), top), (x(tick), bottom)], GREY, 1.0));
            marks.push(text((x(tick), bottom + 22.0), &self.x.text(tick), Anchor::Middle));
        }
        for &tick in &self.y.ticks {
            marks.push(line(vec![(left, y(tick)), (right, y(tick))], GREY, 1.0));
            marks.push(text((left - 8.0, y(tick) + 5.0), &self.y.text(tick), Anchor::End));
        }
        let frame = [
            (left, top),
            (right, top),
            (right, bottom),
            (left, bottom),
            (left, top),
        ];
        marks.push(line(frame.to_vec(), BLACK, 1.0));
        marks.push(text((WIDTH / 2.0, 36.0), &self.title, Anchor::Middle));
        marks.push(text(
            ((left + right) / 2.0, bottom + 55.0),
            &self.x.label,
            Anchor::Middle,
        ));
        marks.push(text((24.0, (top + bottom) / 2.0), &self.y.label, Anchor::Upward));
        for (index, curve) in self.curves.iter().enumerate() {
            let colour = CURVES[index % CURVES.len()];
            let points = thin(curve.points.iter().map(|&(px, py)| (x(px), y(py))));
            marks.push(line(points, colour, 2.0));
            for &(at, from, to) in &curve.bars {
                marks.push(line(vec![(x(at), y(from)), (x(at), y(to))], colour, 1.0));
                for end in [from, to] {
                    marks.push(line(
                        vec![(x(at) - 4.0, y(end)), (x(at) + 4.0, y(end))],
                        colour,
                        1.0,
                    ));
                }
            }
            let row = bottom - 20.0 * (self.curves.len() - index) as f64;
            marks.push(line(
                vec![(right - 290.0, row), (right - 265.0, row)],
                colour,
                2.0,
            ));
            marks.push(text((right - 258.0, row + 5.0), &curve.name, Anchor::Start));
        }
        marks
    }
}

/// Leaves out points that lie less than half a pixel from the one before; a curve of a million points draws as well.
fn thin(points: impl Iterator<Item = (f64, f64)>) -> Vec<(f64, f64)> {
    let mut kept: Vec<(f64, f64)> = Vec::new();
    let mut last = None;
    for point in points {
        let near = |&(x, y): &(f64, f64)| (point.0 - x).abs() < 0.5 && (point.1 - y).abs() < 0.5;
        match kept.last() {
            Some(before) if near(before) => last = Some(point),
            _ => {
                // Where the curve jumps, it leaves from the last point, not from one half a pixel before.
                kept.extend(last.take());
                kept.push(point);
            }
        }
    }
    kept.extend(last);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn chart() -> Chart {
        Chart {
            title: "A < B & C".into(),
            x: Axis::decades("rate", -6, 0),
            y: Axis::linear("share", 0.5, 1.0),
            curves: vec![Curve {
                name: "one (AUC 0.5)".into(),
                points: vec![(1e-6, 0.5), (1e-3, 0.75), (1.0, 1.0)],
                bars: vec![(1e-3, 0.7, 0.8)],
            }],
        }
    }

    #[test]
    fn values_lie_on_their_axes() {
        let marks = chart().marks();
        let blue: Vec<_> = marks
            .iter()
            .filter_map(|mark| match mark {
                Mark::Line {
                    points,
                    colour,
                    width,
                } if *colour == CURVES[0] && *width == 2.0 => Some(points),
                _ => None,
            })
            .collect();
        let [left, right, top, bottom] = AREA;
        let near = |a: (f64, f64), b: (f64, f64)| (a.0 - b.0).abs() < 1e-9 && (a.1 - b.1).abs() < 1e-9;
        let expected = [
            (left, bottom),
            ((left + right) / 2.0, (top + bottom) / 2.0),
            (right, top),
        ];
        assert!(
            blue[0].iter().zip(expected).all(|(&a, b)| near(a, b)),
            "{:?}",
            blue[0]
        );
        for label in ["1e-6", "1e-3", "1e0", "0.50", "1.00", "rate", "share"] {
            let is_there = |mark: &Mark| matches!(mark, Mark::Text { text, .. } if text == label);
            assert!(marks.iter().any(is_there), "{label}");
        }
    }

    #[test]
    fn a_long_curve_is_thinned_and_keeps_its_ends() {
        let many = (0..100_000).map(|i| (f64::from(i) / 1000.0, 7.0));
        let kept = thin(many);
        assert!(kept.len() < 500 && kept[0] == (0.0, 7.0) && kept.last() == Some(&(99.999, 7.0)));
        let jump = [(0.0, 0.0), (0.4, 0.0), (0.4, 50.0)];
        assert_eq!(thin(jump.into_iter()), jump);
    }
}
