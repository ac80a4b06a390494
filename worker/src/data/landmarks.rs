//! The file of `infer --landmarks` and `data align --landmarks`: which faces are in which images. One line a face,
//! separated by tabs or commas: image, then x and y of five points; or JSON, a list of `{"image": .., "landmarks": [[x, y], ..]}` or one such
//! object a line. 68 points instead of five are reduced to them. Pure.

use serde::Deserialize;

use super::align::{FivePoints, Point, five_of_68};

/// One face of an image.
#[derive(Clone, Debug, PartialEq)]
pub struct Face {
    /// As written.
    pub image: String,
    /// Where its five points are.
    pub points: FivePoints,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JsonFace {
    image: String,
    landmarks: JsonPoints,
}

/// Points as pairs or as one row of numbers.
#[derive(Deserialize)]
#[serde(untagged)]
enum JsonPoints {
    Pairs(Vec<Point>),
    Flat(Vec<f64>),
}

/// The faces in a file's text, in its order. Errors name the line, or the entry of a list.
pub fn parse(text: &str) -> Result<Vec<Face>, String> {
    let text = text.trim_start_matches('\u{feff}');
    match text.trim_start().as_bytes().first() {
        Some(b'[') => {
            let faces: Vec<JsonFace> = serde_json::from_str(text).map_err(|error| error.to_string())?;
            let faces = faces.into_iter().enumerate();
            faces
                .map(|(index, face)| json_face(face).map_err(|what| format!("entry {index}: {what}")))
                .collect()
        }
        Some(b'{') => lines(text, |_, line| {
            let face = serde_json::from_str(line).map_err(|error| error.to_string())?;
            json_face(face).map(Some)
        }),
        _ => lines(text, |number, line| {
            let separator = if line.contains('\t') { '\t' } else { ',' };
            let fields: Vec<&str> = line.split(separator).map(str::trim).collect();
            let numbers = &fields[1..];
            // Names of columns.
            if number == 1 && !numbers.is_empty() && numbers.iter().all(|n| n.parse::<f64>().is_err()) {
                return Ok(None);
            }
            let parsed = numbers.iter().map(|field| {
                let number = field.parse();
                number.map_err(|_| format!("{:?} is no number", field.chars().take(40).collect::<String>()))
            });
            face(fields[0], &parsed.collect::<Result<Vec<f64>, _>>()?).map(Some)
        }),
    }
}

/// What each line holds that is not empty.
fn lines(
    text: &str,
    read: impl Fn(usize, &str) -> Result<Option<Face>, String>,
) -> Result<Vec<Face>, String> {
    let lines = text.lines().map(str::trim).zip(1..);
    let faces = lines
        .filter(|(line, _)| !line.is_empty())
        .map(|(line, number)| read(number, line).map_err(|what| format!("line {number}: {what}")));
    faces.filter_map(Result::transpose).collect()
}

fn json_face(read: JsonFace) -> Result<Face, String> {
    match read.landmarks {
        JsonPoints::Pairs(pairs) => face(&read.image, pairs.as_flattened()),
        JsonPoints::Flat(numbers) => face(&read.image, &numbers),
    }
}

fn face(image: &str, numbers: &[f64]) -> Result<Face, String> {
    if image.is_empty() {
        return Err("no image is named".to_owned());
    }
    if numbers.iter().any(|number| !number.is_finite()) {
        return Err(format!("{image}: a landmark is not finite"));
    }
    // No face is that small; some detectors write shares of the picture's sides, a little beyond 0 and 1 at its border.
    let is_share = |number: &f64| (-0.5..=1.5).contains(number);
    if !numbers.is_empty() && numbers.iter().all(is_share) && numbers.iter().any(|n| *n != numbers[0]) {
        return Err(format!(
            "{image}: its landmarks are shares of the picture's sides, not pixels: multiply x by its width, y by its height"
        ));
    }
    let points = numbers.as_chunks::<2>().0;
    let points = match numbers.len() {
        10 => points.try_into().ok(),
        136 => points.try_into().ok().map(five_of_68),
        _ => None,
    };
    let points = points.ok_or_else(|| {
        format!(
            "{image}: {} numbers, expected x and y of 5 points (or of 68)",
            numbers.len()
        )
    })?;
    Ok(Face {
        image: image.to_owned(),
        points,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const POINTS: FivePoints = [[1.0, 2.0], [3.5, 4.0], [5.0, 6.0], [7.0, 8.0], [9.0, -10.0]];

    #[test]
    fn every_form_gives_the_same_faces() {
        let faces = ["a b.jpg", "a b.jpg", "c.png"].map(|image| Face {
            image: image.to_owned(),
            points: POINTS,
        });
        let line = |separator: &str, image: &str| {
            [image, "1", "2", "3.5", "4", "5", "6", "7", "8", "9", "-10"].join(separator)
        };
        let rows = |separator: &str| {
            let lines = faces.each_ref().map(|face| line(separator, &face.image));
            lines.join("\n")
        };
        let objects = faces
            .each_ref()
            .map(|face| serde_json::json!({ "image": face.image, "landmarks": POINTS }).to_string());
        let flat = objects[0]
            .replace("],[", ",")
            .replace("[[", "[")
            .replace("]]", "]");
        for text in [
            rows("\t"),
            rows(","),
            format!("image,{}\r\n\n{}\r\n", ["x"; 10].join(","), rows(", ")),
            objects.join("\n"),
            format!(" [{}]", objects.join(",\n")),
            format!("{flat}\n{}\n{}", objects[1], objects[2]),
        ] {
            assert_eq!(parse(&text).unwrap(), faces, "{text}");
        }
        assert_eq!(parse("\n"), Ok(vec![]));
    }

    #[test]
    fn sixty_eight_points_become_five() {
        let numbers: Vec<String> = (0..136).map(|n| n.to_string()).collect();
        let faces = parse(&format!("x.jpg,{}", numbers.join(","))).unwrap();
        assert_eq!(
            faces[0].points,
            [
                [75.0, 76.0],
                [87.0, 88.0],
                [60.0, 61.0],
                [96.0, 97.0],
                [108.0, 109.0]
            ]
        );
    }

    #[test]
    fn mistakes_name_their_line() {
        for (text, expected) in [
            (
                "a.jpg,1,2\n",
                "line 1: a.jpg: 2 numbers, expected x and y of 5 points",
            ),
            ("a.jpg\n", "line 1: a.jpg: 0 numbers"),
            ("a,1,2,3,4,5,6,7,8,9,x\n", "line 1: \"x\" is no number"),
            (",1,2,3,4,5,6,7,8,9,10", "line 1: no image is named"),
            (
                "a,1,2,3,4,5,6,7,8,9,10\nb,1,2,3,4,5,6,7,8,9,nan",
                "line 2: b: a landmark is not finite",
            ),
            (
                "b,0.3,0.4,0.6,0.4,0.5,0.55,-0.01,0.7,0.6,1.02",
                "line 1: b: its landmarks are shares of the picture's sides, not pixels",
            ),
            ("{\"image\": 1}", "line 1: invalid type"),
            (
                "[{\"image\": \"a\", \"landmarks\": [1, 2]}]",
                "entry 0: a: 2 numbers",
            ),
            ("[{\"image\": \"a\"}]", "missing field `landmarks`"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.starts_with(expected), "{text:?}: {error}");
        }
    }
}
