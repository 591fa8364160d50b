#!/bin/bash
# Runs make targets, one after the other whatever they give, and sums up their tests. For `make test`.
#
#   test.sh TARGET...
#
# What failed, and how, is said again at the end. The last line is `N passed, N failed, N skipped`. A target that fails
# without a failed test in it, because it is no test or did not get that far, counts as one failed test. Status 0:
# something passed and nothing failed.
set -uo pipefail

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
passed=0 failed=0 skipped=0 broken=()

# count WORD FILE: sum of the numbers before WORD in the result lines of all test programs.
count() { sed -n "s/^test result: .* \([0-9]*\) $1;.*/\1/p" "$2" | awk '{ sum += $1 } END { print sum + 0 }'; }

for target in "$@"; do
    echo "== make $target"
    status=0
    "${MAKE:-make}" --no-print-directory "$target" </dev/null 2>&1 | tee "$logs/$target" || status=$?
    target_failed=$(count failed "$logs/$target")
    # Tests without a framework for skipping say so in their output; they are among the passed.
    said=$(grep -c '^SKIPPED: ' "$logs/$target")
    passed=$((passed + $(count passed "$logs/$target") - said))
    skipped=$((skipped + $(count ignored "$logs/$target") + said))
    if [ "$status" != 0 ]; then
        broken+=("$target")
        [ "$target_failed" != 0 ] || target_failed=1
    fi
    failed=$((failed + target_failed))
done

for target in ${broken[@]+"${broken[@]}"}; do
    echo "== failed: make $target"
    sed -n '/^failures:$/,/^test result: FAILED/p' "$logs/$target"
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ] && [ "$passed" != 0 ]
