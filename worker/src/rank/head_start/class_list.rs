//! `head.class_list`: a line for each class in the order of the labels, with the number of its class in the old
//! head, or `new` or `-`. What follows the first word of a line is for people. Pure.

/// By class: the class of the old head that it starts as. Errors name the line.
pub(super) fn parse(text: &str, num_classes: u32, old_classes: u32) -> Result<Vec<Option<u32>>, String> {
    let mut from = Vec::new();
    // Line by old class, from 1; 0 is none.
    let mut taken = vec![0u32; old_classes as usize];
    for (line, number) in text.lines().zip(1u32..) {
        if from.len() == num_classes as usize {
            return Err(format!("line {number}: there are only {num_classes} classes"));
        }
        let word = line.split_whitespace().next().unwrap_or_default();
        let class = match word {
            "" => return Err(format!("line {number}: it is empty")),
            "new" | "-" => None,
            word => {
                let class: u32 = word.parse().map_err(|_| {
                    let shown: String = word.chars().take(40).collect();
                    format!("line {number}: {shown:?} is neither a class's number nor \"new\"")
                })?;
                let place = taken.get_mut(class as usize).ok_or_else(|| {
                    format!("line {number}: class {class} is not one of the old head's 0..{old_classes}")
                })?;
                match std::mem::replace(place, number) {
                    0 => Some(class),
                    before => {
                        return Err(format!(
                            "line {number}: class {class} of the old head is that of line {before} already"
                        ));
                    }
                }
            }
        };
        from.push(class);
    }
    match from.len() == num_classes as usize {
        true => Ok(from),
        false => Err(format!("{} lines for {num_classes} classes", from.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_a_class() {
        let from = parse("2 n000017\nnew\n-  somebody\r\n0\n", 4, 3).unwrap();
        assert_eq!(from, [Some(2), None, None, Some(0)]);
        assert_eq!(parse("", 0, 3), Ok(vec![]));
    }

    #[test]
    fn mistakes_name_their_line() {
        for (text, expected) in [
            ("0\n3\n", "line 2: class 3 is not one of the old head's 0..3"),
            ("0\n\n", "line 2: it is empty"),
            ("x\n1\n", "line 1: \"x\" is neither"),
            ("-1\n1\n", "line 1: \"-1\" is neither"),
            ("99999999999\n1\n", "line 1: \"99999999999\" is neither"),
            (
                "1\n1\n",
                "line 2: class 1 of the old head is that of line 1 already",
            ),
            ("1\n", "1 lines for 2 classes"),
            ("1\n2\n0\n", "line 3: there are only 2 classes"),
        ] {
            let error = parse(text, 2, 3).unwrap_err();
            assert!(error.starts_with(expected), "{text:?}: {error}");
        }
    }
}
