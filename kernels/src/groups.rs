//! Groups of query heads that share a key-value head, cut into parts that a kernel can take.

/// Cuts a group of query heads that share a key-value head into as few equal parts of at most `most` heads as there can
/// be: the parts, and the heads of each.
pub fn cut_group(group: usize, most: usize) -> (usize, usize) {
    let least = group.div_ceil(most);
    let parts =
        (least..=group).find(|parts| group.is_multiple_of(*parts)).expect("a group of one head is a part");
    (parts, group / parts)
}

#[cfg(test)]
mod tests {
    use super::cut_group;

    #[test]
    fn groups_are_cut_into_few_equal_parts() {
        let cut = [1, 6, 8, 9, 12, 13, 16, 64].map(|group| cut_group(group, 8));
        assert_eq!(cut, [(1, 1), (1, 6), (1, 8), (3, 3), (2, 6), (13, 1), (2, 8), (8, 8)]);
        assert_eq!([cut_group(12, 12), cut_group(16, 12)], [(1, 12), (2, 8)]);
    }
}
