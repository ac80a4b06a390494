//! Pages of lists. A token says after which element the next page begins; it is opaque to clients.

use super::status::invalid;
use tonic::Status;

/// Most elements of a page.
const MAX_PAGE: u32 = 1000;

/// Elements of a page: as asked for, or the default.
///
/// # Errors
/// INVALID_ARGUMENT if it is more than 1000.
pub fn size(asked: u32, default: usize) -> Result<usize, Status> {
    match asked {
        0 => Ok(default),
        1..=MAX_PAGE => Ok(asked as usize),
        _ => Err(invalid("page_size", format!("{asked} is not in 1..={MAX_PAGE}"))),
    }
}

/// The offset that a token of [`cut`] stands for; 0 for none.
///
/// # Errors
/// INVALID_ARGUMENT for a token that is none of ours.
pub fn offset(token: &str) -> Result<usize, Status> {
    match token {
        "" => Ok(0),
        _ => token
            .parse()
            .map_err(|_| invalid("page_token", "is not a token of this list")),
    }
}

/// One page of a whole list, and the token of the next; empty on the last.
pub fn cut<T>(all: Vec<T>, offset: usize, size: usize) -> (Vec<T>, String) {
    let end = offset.saturating_add(size);
    let next = if end < all.len() {
        end.to_string()
    } else {
        String::new()
    };
    (all.into_iter().skip(offset).take(size).collect(), next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_cover_a_list_once() {
        let all: Vec<u32> = (0..10).collect();
        let (mut seen, mut token) = (Vec::new(), String::new());
        loop {
            let (page, next) = cut(all.clone(), offset(&token).expect("our token"), 4);
            assert!(page.len() <= 4);
            seen.extend(page);
            if next.is_empty() {
                break;
            }
            token = next;
        }
        assert_eq!(seen, all);
        assert!(cut(all, 99, 4).0.is_empty());
        assert!(offset("x").is_err() && offset("-1").is_err());
        assert!(size(1001, 50).is_err());
        assert_eq!(size(0, 50).expect("default"), 50);
    }
}
