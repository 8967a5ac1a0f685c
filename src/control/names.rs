//! What is said of a name that nothing has.

/// More names than this are not listed.
const LISTED: usize = 12;
/// Least likeness of a name that is taken for the one meant, by Jaro and Winkler: a letter wrong, or two swapped.
const ALIKE: f64 = 0.8;

/// Says that there is no such `kind` ("topic"), and which one may be meant or which ones there are. `list`: the
/// command that shows all.
pub fn unknown<'a>(
    kind: &str,
    name: &str,
    names: impl Iterator<Item = &'a str>,
    list: &str,
) -> String {
    let names: Vec<&str> = names.collect();
    let alike = |other: &&str| strsim::jaro_winkler(name, other);
    let nearest = names.iter().copied().filter(|other| alike(other) >= ALIKE);
    let nearest = nearest.max_by(|a, b| alike(a).total_cmp(&alike(b)));
    let hint = match nearest {
        _ if names.is_empty() => format!("there are no {kind}s"),
        Some(nearest) => format!("did you mean \"{nearest}\"? `{list}` shows all"),
        None if names.len() <= LISTED => format!("there are: {}", names.join(", ")),
        None => format!("`{list}` shows the {} there are", names.len()),
    };
    format!("there is no {kind} \"{name}\"; {hint}")
}

/// [`unknown`] of a topic.
pub fn unknown_topic<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> String {
    unknown("topic", name, names, "taffrail topic list")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_named_or_what_there_is() {
        let say = |name: &str, names: &[&str]| unknown_topic(name, names.iter().copied());
        let text = say("ordesr", &["orders", "trades"]);
        assert!(text.contains("did you mean \"orders\"?"), "{text}");
        let text = say("x", &["orders", "trades"]);
        assert!(text.ends_with("there are: orders, trades"), "{text}");
        assert!(say("x", &[]).ends_with("there are no topics"));
        let many: Vec<String> = (0..20).map(|i| format!("topic{i}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let text = say("x", &many);
        assert!(
            text.ends_with("`taffrail topic list` shows the 20 there are"),
            "{text}"
        );
    }
}
