use super::*;
use crate::limits::COLUMNS;

/// Rows of a batch.
const NUM_ROWS: usize = 80;

/// Every way to deal the rows of a batch out to groups: no slab has two groups, and there are no more slabs than rows.
#[test]
fn slabs_of_groups_do_not_overlap() {
    for columns in COLUMNS {
        let (of_slab, of_group) = (WARP_ROWS / columns, ROWS / columns);
        // One past the last slab of all groups before one, by its first row and number, whatever groups those are.
        let mut ends = [[None; NUM_ROWS + 1]; NUM_ROWS + 1];
        ends[0][0] = Some(0);
        for row in 0..NUM_ROWS {
            for group in 0..=row {
                let Some(end) = ends[row][group] else { continue };
                let first = first_slab(group as u32, row as u32, columns);
                assert!(first >= end, "{columns}: group {group} from row {row}");
                for blocks in 1..=of_group.min((NUM_ROWS - row) as u32) {
                    let own = first + blocks.div_ceil(of_slab);
                    assert!(own <= row as u32 + blocks, "{columns}: {blocks} blocks from row {row}");
                    let all = &mut ends[row + blocks as usize][group + 1];
                    *all = Some(all.unwrap_or(0).max(own));
                }
            }
        }
    }
}

/// Each head of each block has a row of its own, which is found again.
#[test]
fn rows_of_heads() {
    fn check<const G: usize>() {
        for block in 0..ROWS / G as u32 {
            for member in 0..G as u32 {
                let row = Place::row(G as u32, block, member);
                assert_eq!(Place::of_row::<G>(row), (block, member), "{G}");
                assert!(row < ROWS);
            }
        }
    }
    check::<4>();
    check::<8>();
    check::<16>();
}
