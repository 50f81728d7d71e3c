// Apidoc renders docs/api.md from the descriptor set that buf builds: every
// service, message and enum with its comments, field by field.
package main

import (
	"flag"
	"fmt"
	"log"
	"os"
	"sort"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

func main() {
	in := flag.String("in", "build/api.binpb", "descriptor set with source information")
	intro := flag.String("intro", "docs/api-intro.md", "text that stands before the reference")
	out := flag.String("out", "docs/api.md", "file to write")
	flag.Parse()
	if err := render(*in, *intro, *out); err != nil {
		log.Fatal(err)
	}
}

func render(in, intro, out string) error {
	raw, err := os.ReadFile(in)
	if err != nil {
		return err
	}
	var set descriptorpb.FileDescriptorSet
	if err := proto.Unmarshal(raw, &set); err != nil {
		return fmt.Errorf("read %s: %w", in, err)
	}
	files, err := protodesc.NewFiles(&set)
	if err != nil {
		return fmt.Errorf("read %s: %w", in, err)
	}
	head, err := os.ReadFile(intro)
	if err != nil {
		return err
	}
	var own []protoreflect.FileDescriptor
	files.RangeFilesByPackage("wasmatrix.v1", func(f protoreflect.FileDescriptor) bool {
		own = append(own, f)
		return true
	})
	sort.Slice(own, func(i, j int) bool { return own[i].Path() < own[j].Path() })
	var b strings.Builder
	b.Write(head)
	b.WriteString("\n## Services\n")
	for _, f := range own {
		for i := range f.Services().Len() {
			service(&b, f.Services().Get(i))
		}
	}
	b.WriteString("\n## Messages\n")
	for _, f := range own {
		for i := range f.Messages().Len() {
			message(&b, f.Messages().Get(i))
		}
	}
	b.WriteString("\n## Enums\n")
	for _, f := range own {
		for i := range f.Enums().Len() {
			enum(&b, f.Enums().Get(i))
		}
	}
	return os.WriteFile(out, []byte(b.String()), 0o644)
}

func service(b *strings.Builder, s protoreflect.ServiceDescriptor) {
	fmt.Fprintf(b, "\n### %s\n\n%s\n\n| method | request | response | |\n| --- | --- | --- | --- |\n", s.Name(), comment(s))
	for i := range s.Methods().Len() {
		m := s.Methods().Get(i)
		fmt.Fprintf(b, "| %s | %s | %s | %s |\n", m.Name(),
			streamed(m.IsStreamingClient(), m.Input()), streamed(m.IsStreamingServer(), m.Output()), comment(m))
	}
}

func streamed(stream bool, m protoreflect.MessageDescriptor) string {
	if stream {
		return "stream of " + link(m)
	}
	return link(m)
}

func message(b *strings.Builder, m protoreflect.MessageDescriptor) {
	if m.IsMapEntry() {
		return
	}
	fmt.Fprintf(b, "\n### %s\n\n%s\n", m.Name(), comment(m))
	if m.Fields().Len() == 0 {
		return
	}
	b.WriteString("\n| field | type | |\n| --- | --- | --- |\n")
	for i := range m.Fields().Len() {
		f := m.Fields().Get(i)
		fmt.Fprintf(b, "| %d `%s` | %s | %s |\n", f.Number(), f.Name(), fieldType(f), comment(f))
	}
}

func fieldType(f protoreflect.FieldDescriptor) string {
	switch {
	case f.IsMap():
		return "map of " + kind(f.MapKey()) + " to " + kind(f.MapValue())
	case f.IsList():
		return "list of " + kind(f)
	case f.ContainingOneof() != nil && !f.ContainingOneof().IsSynthetic():
		return kind(f) + ", one of " + string(f.ContainingOneof().Name())
	default:
		return kind(f)
	}
}

func kind(f protoreflect.FieldDescriptor) string {
	switch {
	case f.Message() != nil:
		return link(f.Message())
	case f.Enum() != nil:
		return link(f.Enum())
	default:
		return f.Kind().String()
	}
}

func link(d protoreflect.Descriptor) string {
	if d.ParentFile().Package() != "wasmatrix.v1" {
		return string(d.FullName())
	}
	return fmt.Sprintf("[%s](#%s)", d.Name(), strings.ToLower(string(d.Name())))
}

func enum(b *strings.Builder, e protoreflect.EnumDescriptor) {
	fmt.Fprintf(b, "\n### %s\n\n%s\n\n| number | value | |\n| --- | --- | --- |\n", e.Name(), comment(e))
	for i := range e.Values().Len() {
		v := e.Values().Get(i)
		fmt.Fprintf(b, "| %d | %s | %s |\n", v.Number(), v.Name(), comment(v))
	}
}

func comment(d protoreflect.Descriptor) string {
	text := d.ParentFile().SourceLocations().ByDescriptor(d).LeadingComments
	return strings.ReplaceAll(strings.Join(strings.Fields(text), " "), "|", "\\|")
}
