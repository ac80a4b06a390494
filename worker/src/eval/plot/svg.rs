//! A chart as SVG text.

use super::{Anchor, Chart, HEIGHT, Mark, WIDTH};
use std::fmt::Write;

/// The whole file.
pub fn draw(chart: &Chart) -> String {
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"15\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    for mark in chart.marks() {
        match mark {
            Mark::Line { points, colour, width } => {
                let [r, g, b] = colour;
                let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
                let points = points.join(" ");
                writeln!(
                    out,
                    "<polyline points=\"{points}\" fill=\"none\" stroke=\"#{r:02x}{g:02x}{b:02x}\" stroke-width=\"{width}\"/>"
                )
            }
            Mark::Text { at: (x, y), text, anchor } => {
                let (anchor, turn) = match anchor {
                    Anchor::Start => ("start", String::new()),
                    Anchor::Middle => ("middle", String::new()),
                    Anchor::End => ("end", String::new()),
                    Anchor::Upward => ("middle", format!(" transform=\"rotate(-90 {x:.1} {y:.1})\"")),
                };
                let text = escape(&text);
                writeln!(
                    out,
                    "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"#222222\"{turn}>{text}</text>"
                )
            }
        }
        .expect("a String takes all");
    }
    out.push_str("</svg>\n");
    out
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::tests::chart;

    #[test]
    fn a_file_has_every_mark_and_escapes_texts() {
        let svg = super::draw(&chart());
        assert!(svg.starts_with("<svg xmlns=") && svg.ends_with("</svg>\n"));
        assert_eq!(
            svg.matches("<polyline ").count() + svg.matches("<text ").count(),
            chart().marks().len()
        );
        assert!(svg.contains(">A &lt; B &amp; C</text>"));
        assert!(
            svg.contains("points=\"90.0,520.0 430.0,290.0 770.0,60.0\""),
            "{svg}"
        );
    }
}
