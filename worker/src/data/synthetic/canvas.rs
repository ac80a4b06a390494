//! A small painter: soft-edged ellipses in face coordinates on a 112x112 picture. Knows no faces.

use super::super::decode::{Pixels, SIDE};

/// Red, green, blue in [0, 1] as they would be shown.
pub type Colour = [f32; 3];

/// From face coordinates (pixels of an upright, centred face; x right, y down) to the picture.
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// Face point under the middle of the picture is `-shift` rotated and scaled back.
    pub shift: [f32; 2],
    /// Turn in the picture's plane, radians.
    pub roll: f32,
    /// Magnification.
    pub scale: f32,
    /// Perspective: relative growth per pixel to the right and downwards.
    pub slant: [f32; 2],
}

/// An ellipse, bent and turned, with a soft edge.
#[derive(Clone, Copy, Debug)]
pub struct Ellipse {
    /// Centre.
    pub at: [f32; 2],
    /// Half axes.
    pub radii: [f32; 2],
    /// Turn, radians.
    pub turn: f32,
    /// How far the ends lie below the middle, in face pixels.
    pub bend: f32,
    /// Width of the edge, in face pixels.
    pub soft: f32,
}

/// A picture in work.
pub struct Canvas {
    pixels: Vec<Colour>,
    face: Vec<[f32; 2]>,
    scale: f32,
    view: View,
}

impl Canvas {
    /// A picture of one colour seen through `view`.
    pub fn new(view: View, colour: Colour) -> Self {
        let (sin, cos) = view.roll.sin_cos();
        let middle = (SIDE as f32 - 1.0) / 2.0;
        let face = (0..SIDE * SIDE)
            .map(|i| {
                let (x, y) = ((i % SIDE) as f32 - middle, (i / SIDE) as f32 - middle);
                let growth = view.scale * (1.0 + view.slant[0] * x + view.slant[1] * y);
                let (x, y) = ((x - view.shift[0]) / growth, (y - view.shift[1]) / growth);
                [cos * x + sin * y, cos * y - sin * x]
            })
            .collect();
        Self {
            pixels: vec![colour; SIDE * SIDE],
            face,
            scale: view.scale,
            view,
        }
    }

    /// Changes every pixel, given its face coordinates.
    pub fn each(&mut self, mut change: impl FnMut([f32; 2], &mut Colour)) {
        for (pixel, at) in self.pixels.iter_mut().zip(&self.face) {
            change(*at, pixel);
        }
    }

    /// Paints a shape over what is there.
    pub fn paint(&mut self, shape: &Ellipse, colour: Colour, opacity: f32) {
        let [x0, x1, y0, y1] = self.bounds(shape);
        let (sin, cos) = shape.turn.sin_cos();
        for y in y0..y1 {
            let row = y * SIDE + x0..y * SIDE + x1;
            for (pixel, at) in self.pixels[row.clone()].iter_mut().zip(&self.face[row]) {
                let cover = opacity * shape.cover(*at, sin, cos);
                if cover > 0.0 {
                    blend(pixel, colour, cover);
                }
            }
        }
    }

    /// Pixels that the shape can touch: first and end column, first and end row.
    fn bounds(&self, shape: &Ellipse) -> [usize; 4] {
        let (sin, cos) = self.view.roll.sin_cos();
        let [x, y] = shape.at;
        let middle = (SIDE as f32 - 1.0) / 2.0;
        let reach = shape.radii[0].max(shape.radii[1]) + shape.bend.abs() + shape.soft;
        let (x, y) = (cos * x - sin * y, sin * x + cos * y);
        // The perspective moves a point by at most its growth at the far corner.
        let growth = 1.0 + 56.0 * (self.view.slant[0].abs() + self.view.slant[1].abs());
        let margin = self.scale * reach * growth + (growth - 1.0) * 60.0 + 2.0;
        let range = |centre: f32| {
            let low = (centre - margin).floor().clamp(0.0, SIDE as f32) as usize;
            let high = (centre + margin).ceil().clamp(0.0, SIDE as f32) as usize;
            (low, high)
        };
        let (x0, x1) = range(middle + self.view.shift[0] + self.scale * x);
        let (y0, y1) = range(middle + self.view.shift[1] + self.scale * y);
        [x0, x1, y0, y1]
    }

    /// Smooths with the kernel [w, 1 - 2w, w] along rows and columns.
    pub fn blur(&mut self, weight: f32) {
        let mut smoothed = self.pixels.clone();
        for stride in [1, SIDE] {
            // Three views of the picture, one step apart; the pixels at the border stay.
            let sides = self.pixels.iter().zip(self.pixels.iter().skip(2 * stride));
            let inner = self
                .pixels
                .iter()
                .skip(stride)
                .zip(smoothed.iter_mut().skip(stride));
            for ((before, after), (here, out)) in sides.zip(inner) {
                *out =
                    std::array::from_fn(|c| (1.0 - 2.0 * weight) * here[c] + weight * (before[c] + after[c]));
            }
            self.pixels.copy_from_slice(&smoothed);
        }
    }

    /// The picture in 8 bits, after `change` of every pixel at its place (column, row).
    pub fn finish(&self, out: &mut Pixels, mut change: impl FnMut([f32; 2], Colour) -> Colour) {
        let out = out.as_chunks_mut::<3>().0;
        for (i, (pixel, out)) in self.pixels.iter().zip(out).enumerate() {
            let colour = change([(i % SIDE) as f32, (i / SIDE) as f32], *pixel);
            *out = colour.map(|v| (v * 255.0 + 0.5).clamp(0.0, 255.0) as u8);
        }
    }
}

impl Ellipse {
    /// An upright ellipse with an edge of a pixel and a half.
    pub fn new(at: [f32; 2], radii: [f32; 2]) -> Self {
        Self {
            at,
            radii,
            turn: 0.0,
            bend: 0.0,
            soft: 1.5,
        }
    }

    /// The same, turned.
    pub fn turned(self, turn: f32) -> Self {
        Self { turn, ..self }
    }

    /// The same, bent.
    pub fn bent(self, bend: f32) -> Self {
        Self { bend, ..self }
    }

    /// The same with another edge.
    pub fn soft(self, soft: f32) -> Self {
        Self { soft, ..self }
    }

    /// Share of a point that it covers.
    fn cover(&self, at: [f32; 2], sin: f32, cos: f32) -> f32 {
        let (x, y) = (at[0] - self.at[0], at[1] - self.at[1]);
        let (x, y) = ((cos * x + sin * y) / self.radii[0], cos * y - sin * x);
        let y = (y - self.bend * x * x) / self.radii[1];
        let inside = (1.0 - (x * x + y * y).sqrt()) * self.radii[0].min(self.radii[1]);
        (0.5 + inside / self.soft).clamp(0.0, 1.0)
    }
}

/// `over` over `under`.
pub fn blend(under: &mut Colour, over: Colour, share: f32) {
    for (u, o) in under.iter_mut().zip(over) {
        *u += share * (o - *u);
    }
}

/// The colour times a factor a channel.
pub fn tint(colour: Colour, by: Colour) -> Colour {
    [colour[0] * by[0], colour[1] * by[1], colour[2] * by[2]]
}

/// The colour times a factor.
pub fn shade(colour: Colour, by: f32) -> Colour {
    colour.map(|v| v * by)
}

/// Between two colours.
pub fn mix(a: Colour, b: Colour, share: f32) -> Colour {
    let mut out = a;
    blend(&mut out, b, share);
    out
}
