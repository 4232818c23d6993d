//! Texts that a person types again: as a shell takes them.
//!
//! What it is not: nothing here is run.

/// A word, in quotes if it needs them.
#[must_use]
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+,:@%=".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn a_path_is_quoted_where_a_shell_would_split_it() {
        assert_eq!(quoted("/srv/disk-1.raw"), "/srv/disk-1.raw");
        assert_eq!(quoted("/srv/my disk's.raw"), r"'/srv/my disk'\''s.raw'");
    }
}
