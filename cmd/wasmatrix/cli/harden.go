package cli

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// harden makes a command and all below it refuse what they do not understand
// as a usage error. Left alone, cobra prints the help of a group and exits 0
// when its subcommand does not exist.
func harden(cmd *cobra.Command) {
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetFlagErrorFunc(flagError)
	if cmd.HasSubCommands() && !cmd.Runnable() {
		cmd.RunE = runGroup
		cmd.Args = cobra.ArbitraryArgs
		// The unknown subcommand is what to complain about, not its flags.
		cmd.FParseErrWhitelist.UnknownFlags = true
	} else if check := cmd.Args; check != nil {
		cmd.Args = func(c *cobra.Command, args []string) error {
			if err := check(c, args); err != nil {
				return &usageError{err: argsError(c, args, err), next: c.UseLine()}
			}
			return nil
		}
	}
	for _, sub := range cmd.Commands() {
		harden(sub)
	}
}

func argsError(cmd *cobra.Command, args []string, err error) error {
	// cobra.NoArgs calls a stray argument an unknown command.
	if strings.HasPrefix(err.Error(), "unknown command") && len(args) > 0 {
		return fmt.Errorf("%s takes no argument, got %q", cmd.CommandPath(), args[0])
	}
	return fmt.Errorf("%s: %w", cmd.CommandPath(), err)
}

func runGroup(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return cmd.Help()
	}
	cmd.SuggestionsMinimumDistance = 2
	next := cmd.CommandPath() + " --help"
	if close := cmd.SuggestionsFor(args[0]); len(close) > 0 {
		next = cmd.CommandPath() + " " + strings.Join(close, ", or "+cmd.CommandPath()+" ")
	}
	return &usageError{err: fmt.Errorf("unknown command %q for %q", args[0], cmd.CommandPath()), next: next}
}

func flagError(cmd *cobra.Command, err error) error {
	if errors.Is(err, pflag.ErrHelp) {
		return err
	}
	out := &usageError{err: fmt.Errorf("%s: %w", cmd.CommandPath(), err), next: cmd.CommandPath() + " --help"}
	if unknown, ok := errors.AsType[*pflag.NotExistError](err); ok {
		var names []string
		visit := func(f *pflag.Flag) { names = append(names, f.Name) }
		cmd.Flags().VisitAll(visit)
		cmd.InheritedFlags().VisitAll(visit)
		if close := nearest(unknown.GetSpecifiedName(), names); close != "" {
			out.next = "--" + close
		}
	}
	return out
}

// nearest returns the candidate that word was probably meant to be, or "".
func nearest(word string, candidates []string) string {
	best, bestDistance := "", 1+len(word)/3
	for _, c := range candidates {
		if d := distance(strings.ToLower(word), strings.ToLower(c)); d <= bestDistance && c != word {
			best, bestDistance = c, d-1
		}
	}
	return best
}

// distance is the number of insertions, deletions and changes between a and b (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
