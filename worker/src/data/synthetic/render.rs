//! Draws one picture of a person: what varies from image to image, and the order of painting.

use super::{
    super::decode::Pixels,
    canvas::{Canvas, Colour, Ellipse, View, blend, mix, shade, tint},
    identity::Identity,
};
use crate::random::{Purpose, Stream};

/// What one photograph adds to a person.
struct Shot {
    view: View,
    /// Turn of the head to the side and up, radians.
    yaw: f32,
    pitch: f32,
    /// Openness of the eyes, 0.2 to 1.1.
    eyes: f32,
    gaze: [f32; 2],
    brows: f32,
    smile: f32,
    mouth_open: f32,
    /// Direction of the light and how much of it comes from there.
    light: [f32; 3],
    directed: f32,
    cast: Colour,
    gamma: f32,
    contrast: f32,
    haze: f32,
    gradient: [f32; 2],
    noise: f32,
    blurs: u32,
}

impl Shot {
    fn draw(stream: &mut Stream) -> Self {
        let gain = stream.next_in(-0.35, 0.25).exp() as f32;
        let mut draw = |low: f64, high: f64| stream.next_in(low, high) as f32;
        let light = [draw(-1.0, 1.0), draw(-0.9, 0.4), draw(0.35, 1.0)];
        let length = light.iter().map(|v| v * v).sum::<f32>().sqrt();
        // From lamp light to shade: red against blue, and a little green.
        let (warm, green) = (draw(-0.17, 0.17), draw(-0.07, 0.07));
        Self {
            view: View {
                shift: [draw(-4.0, 4.0), draw(-4.0, 4.0)],
                roll: draw(-0.17, 0.17),
                scale: draw(0.92, 1.1),
                slant: [draw(-0.0015, 0.0015), draw(-0.0015, 0.0015)],
            },
            yaw: draw(-0.35, 0.35),
            pitch: draw(-0.2, 0.2),
            eyes: draw(0.6, 1.1),
            gaze: [draw(-0.45, 0.45), draw(-0.3, 0.3)],
            brows: draw(-1.0, 1.8),
            smile: draw(-1.5, 3.0),
            mouth_open: draw(-4.0, 5.0).max(0.0),
            light: light.map(|v| v / length),
            directed: draw(0.1, 0.6),
            cast: [gain * (1.0 + warm), gain * (1.0 + green), gain * (1.0 - warm)],
            gamma: draw(0.82, 1.22),
            contrast: draw(0.75, 1.15),
            haze: draw(-0.04, 0.12),
            gradient: [draw(-0.27, 0.27), draw(-0.27, 0.27)],
            noise: draw(0.0, 0.038),
            blurs: draw(0.0, 3.0) as u32,
        }
    }

    /// Where a point of the front of the head comes to lie when the head turns; `depth` in front of the ears' plane.
    fn turn(&self, at: [f32; 2], depth: f32) -> [f32; 2] {
        let (yaw_sin, yaw_cos) = self.yaw.sin_cos();
        let (pitch_sin, pitch_cos) = self.pitch.sin_cos();
        [
            at[0] * yaw_cos + depth * yaw_sin,
            at[1] * pitch_cos + depth * pitch_sin,
        ]
    }
}

/// Draws picture `image` of a person.
pub fn render(seed: u64, identity: u64, image: u64, out: &mut Pixels) {
    let person = Identity::new(seed, identity);
    let mut stream = Stream::new(seed, Purpose::Synthetic, identity, image);
    let shot = Shot::draw(&mut stream);
    let mut canvas = Canvas::new(shot.view, colour(&mut stream));
    background(&mut canvas, &mut stream);
    hair_behind(&mut canvas, &person, &shot);
    head(&mut canvas, &person, &shot);
    eyes(&mut canvas, &person, &shot);
    nose(&mut canvas, &person, &shot);
    mouth(&mut canvas, &person, &shot);
    hair_before(&mut canvas, &person, &shot);
    illuminate(&mut canvas, &person, &shot);
    accessories(&mut canvas, &shot, &mut stream);
    (0..shot.blurs).for_each(|_| canvas.blur(0.16));
    develop(&canvas, &shot, &mut stream, out);
}

fn colour(stream: &mut Stream) -> Colour {
    std::array::from_fn(|_| stream.next_in(0.05, 0.95) as f32)
}

fn background(canvas: &mut Canvas, stream: &mut Stream) {
    for _ in 0..4 {
        let at = [
            stream.next_in(-60.0, 60.0) as f32,
            stream.next_in(-60.0, 60.0) as f32,
        ];
        let radii = [
            stream.next_in(10.0, 50.0) as f32,
            stream.next_in(10.0, 50.0) as f32,
        ];
        let soft = stream.next_in(2.0, 25.0) as f32;
        let turn = stream.next_in(0.0, 3.0) as f32;
        canvas.paint(
            &Ellipse::new(at, radii).soft(soft).turned(turn),
            colour(stream),
            0.8,
        );
    }
    // Shoulders: clothes say nothing of who it is.
    canvas.paint(&Ellipse::new([0.0, 78.0], [56.0, 26.0]), colour(stream), 1.0);
}

fn hair_behind(canvas: &mut Canvas, person: &Identity, shot: &Shot) {
    let dark = shade(person.hair, 0.75);
    let top = -person.head_height - person.hair_top;
    let down = person.hair_down;
    let centre = shot.turn([0.0, (top + down) / 2.0], -14.0);
    let radii = [person.head_width + person.hair_side, (down - top) / 2.0];
    canvas.paint(&Ellipse::new(centre, radii).soft(3.0), dark, 1.0);
    // Neck.
    canvas.paint(
        &Ellipse::new([0.0, 50.0], [person.head_width * 0.52, 26.0]),
        shade(person.skin, 0.78),
        1.0,
    );
    for side in [-1.0, 1.0] {
        let ear = shot.turn(
            [side * (person.head_width + person.ear * 0.35), person.ear_y],
            -6.0,
        );
        canvas.paint(
            &Ellipse::new(ear, [person.ear * 0.6, person.ear * 1.3]),
            shade(person.skin, 0.88),
            1.0,
        );
    }
}

/// Share of a point that the head covers, and its surface normal.
fn head_at(person: &Identity, at: [f32; 2]) -> (f32, [f32; 3]) {
    let y = at[1] / person.head_height;
    let below = y.clamp(0.0, 1.0);
    let width =
        person.head_width * (1.0 - person.jaw_taper * below * below + person.chin * below * (1.0 - below));
    let x = at[0] / width.max(1.0);
    let distance = (x * x + y * y).sqrt();
    let cover = (0.5 + (1.0 - distance) * person.head_width / 2.0).clamp(0.0, 1.0);
    (cover, [x, y, (1.0 - x * x - y * y).max(0.0).sqrt()])
}

fn head(canvas: &mut Canvas, person: &Identity, shot: &Shot) {
    let beard_colour = mix(person.hair, person.skin, 0.25);
    canvas.each(|at, pixel| {
        let (cover, _) = head_at(person, at);
        if cover > 0.0 {
            let mut skin = person.skin;
            // The beard begins below the nose and follows the jaw.
            let beard = ((at[1] - person.mouth_y + 8.0 + at[0].abs() * -0.25) / 8.0).clamp(0.0, 1.0);
            blend(&mut skin, beard_colour, person.beard * beard);
            blend(pixel, skin, cover);
        }
    });
    for side in [-1.0, 1.0] {
        let cheek = shot.turn([side * person.head_width * 0.55, 14.0], 18.0);
        let flush = mix(person.skin, [0.85, 0.35, 0.3], 0.6);
        canvas.paint(
            &Ellipse::new(cheek, [9.0, 7.0]).soft(9.0),
            flush,
            person.cheek.max(0.0),
        );
    }
    for (at, radius) in &person.marks {
        canvas.paint(
            &Ellipse::new(shot.turn(*at, 20.0), [*radius; 2]),
            shade(person.skin, 0.35),
            0.85,
        );
    }
}

fn eyes(canvas: &mut Canvas, person: &Identity, shot: &Shot) {
    let [width, height] = person.eye_radii;
    let open = (height * shot.eyes).max(0.8);
    let foreshortened = width * shot.yaw.cos();
    for side in [-1.0, 1.0] {
        let at = shot.turn([side * person.eye_x, person.eye_y], 22.0);
        let turn = side * person.eye_turn;
        let socket = Ellipse::new(at, [foreshortened + 3.5, height + 3.5]).soft(5.0);
        canvas.paint(&socket, shade(person.skin, 0.72), 0.55);
        canvas.paint(
            &Ellipse::new(at, [foreshortened, open + 0.6]).turned(turn),
            shade(person.skin, 0.3),
            0.9,
        );
        canvas.paint(
            &Ellipse::new(at, [foreshortened - 0.6, open]).turned(turn),
            [0.93, 0.92, 0.9],
            1.0,
        );
        let iris = person.iris.min(open + 0.7);
        let pupil = [
            at[0] + shot.gaze[0] * (width - person.iris),
            at[1] + shot.gaze[1] * open,
        ];
        canvas.paint(
            &Ellipse::new(pupil, [person.iris, iris]).soft(1.0),
            person.iris_colour,
            1.0,
        );
        canvas.paint(
            &Ellipse::new(pupil, [person.iris * 0.42, iris * 0.42]).soft(1.0),
            [0.03; 3],
            1.0,
        );
        let brow_at = [side * person.eye_x, person.eye_y - person.brow_gap - shot.brows];
        let brow = Ellipse::new(
            shot.turn(brow_at, 23.0),
            [person.brow_length * shot.yaw.cos(), person.brow_width],
        );
        canvas.paint(
            &brow.turned(side * person.brow_turn).bent(person.brow_bend),
            shade(person.hair, 0.7),
            0.9,
        );
    }
}

fn nose(canvas: &mut Canvas, person: &Identity, shot: &Shot) {
    let tip_y = person.eye_y + person.nose_length;
    let middle = shot.turn([0.0, person.eye_y + person.nose_length * 0.5], 28.0);
    let tip = shot.turn([0.0, tip_y], 34.0);
    let bridge = Ellipse::new(middle, [person.nose_bridge, person.nose_length * 0.55]).soft(3.0);
    // The ridge catches light, its side away from the lamp lies in shadow.
    let away = -shot.light[0].signum() * person.nose_bridge * 1.3;
    let shadow = Ellipse {
        at: [middle[0] + away, middle[1]],
        ..bridge
    };
    canvas.paint(&shadow, shade(person.skin, 0.7), 0.3 + 0.4 * shot.directed);
    canvas.paint(&bridge, mix(person.skin, [1.0; 3], 0.25), 0.5);
    let wings = Ellipse::new(tip, [person.nose_width, person.nose_width * 0.55]).soft(2.5);
    canvas.paint(&wings, shade(person.skin, 0.84), 0.8);
    canvas.paint(
        &Ellipse::new(tip, [person.nose_width * 0.5, person.nose_width * 0.4]).soft(3.0),
        mix(person.skin, [1.0; 3], 0.2),
        0.7,
    );
    for side in [-1.0, 1.0] {
        let nostril = [
            tip[0] + side * person.nose_width * 0.5,
            tip[1] + person.nose_width * 0.32,
        ];
        canvas.paint(&Ellipse::new(nostril, [1.5, 0.9]), shade(person.skin, 0.25), 0.85);
    }
}

fn mouth(canvas: &mut Canvas, person: &Identity, shot: &Shot) {
    let at = shot.turn([0.0, person.mouth_y], 27.0);
    let width = (person.mouth_width + 0.8 * shot.smile) * shot.yaw.cos();
    let bend = -shot.smile;
    let gap = shot.mouth_open;
    let upper = [at[0], at[1] - gap * 0.3 - person.upper_lip * 0.5];
    let lower = [at[0], at[1] + gap * 0.7 + person.lower_lip * 0.5];
    if person.moustache > 0.0 {
        let moustache = Ellipse::new([at[0], upper[1] - person.upper_lip - 2.0], [width * 0.95, 2.6])
            .bent(2.0)
            .soft(2.0);
        canvas.paint(&moustache, shade(person.hair, 0.85), person.moustache);
    }
    canvas.paint(
        &Ellipse::new(upper, [width, person.upper_lip]).bent(bend),
        shade(person.lip, 0.85),
        0.95,
    );
    canvas.paint(
        &Ellipse::new(lower, [width * 0.9, person.lower_lip]).bent(bend),
        person.lip,
        0.95,
    );
    let inside = Ellipse::new([at[0], at[1] + gap * 0.2], [width * 0.92, 0.5 + gap * 0.6])
        .bent(bend)
        .soft(1.2);
    canvas.paint(&inside, [0.16, 0.05, 0.05], 0.9);
    if gap > 2.0 {
        let teeth = Ellipse::new([at[0], at[1] - gap * 0.1], [width * 0.6, gap * 0.28]).bent(bend);
        canvas.paint(&teeth, [0.9, 0.88, 0.82], 0.85);
    }
    let chin = Ellipse::new([at[0], lower[1] + person.lower_lip + 2.5], [width * 0.6, 1.6]).soft(3.0);
    canvas.paint(&chin, shade(person.skin, 0.7), 0.4);
}

fn hair_before(canvas: &mut Canvas, person: &Identity, shot: &Shot) {
    let top = -person.head_height - person.hair_top;
    let (yaw_sin, pitch_sin) = (shot.yaw.sin(), shot.pitch.sin());
    canvas.each(|at, pixel| {
        let [x, y] = [at[0] - 8.0 * yaw_sin, at[1] - 16.0 * pitch_sin];
        // Inside the outline of the hair, above the hairline, which the parting slants and the temples round.
        let across = x / (person.head_width + person.hair_side * 0.5 + 0.5);
        let line = person.hairline + person.fringe * across * across + 12.0 * person.parting * across;
        let outline = 1.0 - across * across - ((y - 2.0) / (top - 4.0)).powi(2) * f32::from(y < 2.0);
        let temple = (across.abs() - 0.86) * 60.0;
        let edge = (line - y).max(temple.min(person.hair_down - y));
        let cover = (0.5 + edge / 2.5).clamp(0.0, 1.0) * (0.5 + outline * 12.0).clamp(0.0, 1.0);
        if cover > 0.0 {
            blend(pixel, person.hair, cover);
        }
    });
}

/// Light from one side on the roundness of the head.
fn illuminate(canvas: &mut Canvas, person: &Identity, shot: &Shot) {
    canvas.each(|at, pixel| {
        let (cover, normal) = head_at(person, at);
        if cover > 0.0 {
            let facing: f32 = normal.iter().zip(shot.light).map(|(n, l)| n * l).sum();
            let light = 1.0 - shot.directed + 1.35 * shot.directed * facing.max(0.0);
            let lit = shade(*pixel, light);
            blend(pixel, lit, cover);
        }
    });
}

/// What hides a part of the face: glasses, a hand, a scarf.
fn accessories(canvas: &mut Canvas, shot: &Shot, stream: &mut Stream) {
    if stream.next_uniform() < 0.1 {
        let frame = shade(colour(stream), 0.5);
        for side in [-1.0, 1.0] {
            let at = shot.turn([side * 17.0, -7.0], 26.0);
            for step in 0..20 {
                let (sin, cos) = (step as f32 * std::f32::consts::TAU / 20.0).sin_cos();
                let dot = [at[0] + 11.0 * cos, at[1] + 8.5 * sin];
                canvas.paint(&Ellipse::new(dot, [1.9, 1.3]), frame, 0.9);
            }
        }
    }
    if stream.next_uniform() < 0.14 {
        let at = [
            stream.next_in(-45.0, 45.0) as f32,
            stream.next_in(-45.0, 50.0) as f32,
        ];
        let radii = [stream.next_in(7.0, 20.0) as f32, stream.next_in(5.0, 14.0) as f32];
        let turn = stream.next_in(0.0, 3.1) as f32;
        canvas.paint(&Ellipse::new(at, radii).turned(turn), colour(stream), 1.0);
    }
}

/// Exposure, colour of the light, tone curve and noise.
fn develop(canvas: &Canvas, shot: &Shot, stream: &mut Stream, out: &mut Pixels) {
    // One table for the tone curve instead of a power per channel.
    let curve: [f32; 257] = std::array::from_fn(|i| {
        0.5 + shot.contrast * ((i as f32 / 256.0).powf(shot.gamma) - 0.5) + shot.haze
    });
    canvas.finish(out, |[x, y], pixel| {
        let falloff = 1.0 + (shot.gradient[0] * (x - 56.0) + shot.gradient[1] * (y - 56.0)) / 56.0;
        let lit = tint(shade(pixel, falloff.max(0.0)), shot.cast);
        // Four 16-bit draws in one: three for the channels, one for all of them; near enough to normal after the blur of JPEG.
        let bits = stream.next_bits();
        let draw = |k: u32| ((bits >> (16 * k)) & 0xffff) as f32 / 32_768.0 - 1.0;
        let grey = draw(3);
        let mut channel = 0;
        lit.map(|v| {
            channel += 1;
            curve[(v.clamp(0.0, 1.0) * 256.0) as usize] + shot.noise * (grey + 0.6 * draw(channel - 1))
        })
    });
}
