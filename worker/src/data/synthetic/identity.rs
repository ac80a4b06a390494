//! What an identity fixes: the geometry of a face in pixels of an upright crop (origin in its middle, x right, y down)
//! and its colours. The ranges overlap so that no single trait tells people apart.

use super::canvas::{Colour, mix, shade};
use crate::random::{Purpose, Stream};

/// A person.
#[derive(Clone, Debug)]
pub struct Identity {
    pub head_width: f32,
    pub head_height: f32,
    /// How much narrower the chin is than the temples, 0 to 0.6.
    pub jaw_taper: f32,
    pub ear: f32,
    pub ear_y: f32,
    pub skin: Colour,
    pub hair: Colour,
    /// Lowest hair on the forehead.
    pub hairline: f32,
    /// Hair beyond the head, at the top and at the sides.
    pub hair_top: f32,
    pub hair_side: f32,
    /// Lowest hair at the sides.
    pub hair_down: f32,
    /// Slope and place of the parting.
    pub parting: f32,
    pub fringe: f32,
    pub eye_x: f32,
    pub eye_y: f32,
    pub eye_radii: [f32; 2],
    pub eye_turn: f32,
    pub iris: f32,
    pub iris_colour: Colour,
    pub brow_gap: f32,
    pub brow_length: f32,
    pub brow_width: f32,
    pub brow_turn: f32,
    pub brow_bend: f32,
    pub nose_length: f32,
    pub nose_width: f32,
    pub nose_bridge: f32,
    pub mouth_y: f32,
    pub mouth_width: f32,
    pub upper_lip: f32,
    pub lower_lip: f32,
    pub lip: Colour,
    pub chin: f32,
    pub beard: f32,
    pub moustache: f32,
    pub cheek: f32,
    /// Moles: place, radius.
    pub marks: Vec<([f32; 2], f32)>,
}

impl Identity {
    /// The person of this number.
    pub fn new(seed: u64, identity: u64) -> Self {
        // The counter of images never gets here: the person's own draws have a counter of their own.
        let mut stream = Stream::new(seed, Purpose::Synthetic, identity, u64::MAX);
        let mut draw = |low: f64, high: f64| stream.next_in(low, high) as f32;
        let head_width = draw(31.0, 43.0);
        let head_height = draw(43.0, 53.0);
        let (light, warm) = (draw(0.0, 1.0), draw(0.0, 1.0));
        let skin = mix(
            mix([0.36, 0.22, 0.15], [0.98, 0.83, 0.72], light),
            mix([0.42, 0.28, 0.12], [0.97, 0.78, 0.60], light),
            warm,
        );
        let (dark, red) = (draw(0.0, 1.0), draw(0.0, 1.0));
        let hair = mix(
            mix([0.06, 0.05, 0.05], [0.82, 0.68, 0.42], dark * dark),
            mix([0.16, 0.06, 0.03], [0.62, 0.30, 0.12], dark),
            red * red,
        );
        let hair = match draw(0.0, 1.0) {
            grey if grey > 0.88 => mix(hair, [0.72, 0.72, 0.74], 0.8),
            _ => hair,
        };
        let (blue, green) = (draw(0.0, 1.0), draw(0.0, 1.0));
        let iris_colour = mix(
            mix([0.26, 0.14, 0.07], [0.30, 0.45, 0.66], blue),
            [0.32, 0.46, 0.26],
            0.6 * green,
        );
        let redness = draw(0.1, 0.8);
        let marks = (0..3)
            .filter_map(|_| {
                let mark = ([draw(-28.0, 28.0), draw(-8.0, 36.0)], draw(0.9, 2.0));
                (draw(0.0, 1.0) < 0.35).then_some(mark)
            })
            .collect();
        let hair_long = draw(0.0, 1.0);
        let bearded = draw(0.0, 1.0);
        Self {
            head_width,
            head_height,
            jaw_taper: draw(0.05, 0.55),
            ear: draw(3.0, 9.0),
            ear_y: draw(-8.0, 6.0),
            skin,
            hair,
            hairline: -head_height + draw(7.0, 24.0),
            hair_top: draw(1.0, 9.0),
            hair_side: draw(0.0, 8.0),
            hair_down: match hair_long {
                long if long > 0.6 => draw(20.0, 70.0),
                _ => draw(-30.0, 5.0),
            },
            parting: draw(-0.5, 0.5),
            fringe: draw(-7.0, 9.0),
            eye_x: draw(13.0, 21.5),
            eye_y: draw(-13.0, -1.0),
            eye_radii: [draw(5.0, 8.5), draw(2.2, 4.8)],
            eye_turn: draw(-0.28, 0.28),
            iris: draw(2.0, 3.8),
            iris_colour,
            brow_gap: draw(6.5, 12.0),
            brow_length: draw(6.0, 11.0),
            brow_width: draw(0.8, 2.9),
            brow_turn: draw(-0.32, 0.32),
            brow_bend: draw(-0.5, 3.0),
            nose_length: draw(12.0, 22.0),
            nose_width: draw(4.0, 9.5),
            nose_bridge: draw(1.2, 3.6),
            mouth_y: draw(21.0, 31.0),
            mouth_width: draw(7.5, 16.0),
            upper_lip: draw(1.0, 3.4),
            lower_lip: draw(1.4, 4.2),
            lip: mix(shade(skin, 0.8), [0.72, 0.22, 0.24], redness),
            chin: draw(-0.25, 0.25),
            beard: if bearded > 0.75 { draw(0.25, 0.85) } else { 0.0 },
            moustache: if bearded > 0.65 { draw(0.2, 0.9) } else { 0.0 },
            cheek: draw(-0.15, 0.3),
            marks,
        }
    }
}
